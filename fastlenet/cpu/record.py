"""What a convolution's kernels are told: names for the places of a table of integers.

`plan` fills such a table once for each kind of call, and the kernels read it. Offsets and steps are bytes. Addresses of
further tables stand in it, too. Everything here is independent of the number of images, and of where tensors lie.

Where the lanes of a vector are filters or channels of one image (see `convolution`), "filter" and "channel" below mean
16 of them.
"""

(
    GROUPS,
    CHANNELS,  # of input, in a group
    FILTERS,  # of a group
    FILTER_TILES,  # passes over a group's filters
    CHANNEL_TILES,  # passes over a group's channels, for the input's gradient
    TAPS,  # cells of the kernel
    PRODUCTS,  # whose sum is a pixel: taps of all channels
    ALL_FILTERS,  # of a group, one by one, where FILTERS counts vectors of 16
    SOURCE_STEP,  # from channel to channel in a block of (padded) images
    TARGET_STEP,  # from channel to channel in a block of pooled images
    INPUT_STEP,  # from channel to channel in a block of images as they came, and of their gradient
    # Forward.
    PIXEL_TILES,
    PIXELS,  # table: offsets of the pixels of each tile in the source
    READY,  # table: windows that are complete after each tile
    CHUNKS,
    CHUNK,  # table: first and last channel, first and last tap of each chain of additions
    TAP,  # table: offset of each tap in the source
    WINDOWS,
    CELLS,  # of a window
    CELL,  # table: for each window and cell the position of its pixel, or -1
    EMPTY,  # table: for each window whether it has no cell at all
    TARGET,  # table: offset of each window in the target
    CONV_BYTES,  # size of the convolution of a tile of filters
    # Backward.
    GRAD_BYTES,  # size of the gradient of a tile of filters at the convolution's resolution
    GRAD_CELL,  # table: for each window and cell its offset there, or -1
    OVERLAP,  # whether some pixel belongs to several windows
    POSITION,  # table: for each pixel, in the forward's order, its offset in the source and in the gradient
    BANDS,
    BAND,  # table: first and last window whose gradient comes next, first and last pixel that is complete then
    TAP_TILES,
    TAP_TILE,  # table: offset in the source of each tap of each channel, in tiles
    INPUT_TILES,
    INPUT_TILE,  # table: for each tile of input pixels base, first and last tap, then each pixel's offset or -1
    INPUT_TAP,  # table: for each tap offset in the gradient and offset of its weight
    EXACT_TILES,  # the same three without any product that is zero by its place alone, for weights that are not finite
    EXACT_TILE,
    EXACT_TAP,
    # Layout of the padded images.
    PAD_RUNS,
    PAD_RUN,  # table: for each run of pixels that padding keeps together offset in the images, in the padded, and size
    PAD_BYTES,  # size of a block of padded images, 0 where nothing is padded
    INPUT_BYTES,  # size of a block of images
    TARGET_BYTES,  # size of a block of pooled images
    PARTIAL_BYTES,  # size of the partial sums of the gradients of weight and bias
    PACKED_BYTES,  # size of the weights as the forward or the backward reads them
    TILE_FILTERS,
    TILE_CHANNELS,
    TILE_TAPS,
    SIZE,
) = range(48)
