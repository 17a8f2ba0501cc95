"""What a convolution's kernels are told: names for the places of the tables of the forward and of the gradients.

`plan` fills such a table once for each kind of call, and the kernels read it. Offsets and steps are bytes. Addresses of
further tables stand in it, too. Everything here is independent of where tensors lie, and of the number of images.

Where the lanes of a vector are filters of one image (see `image`), "filter" means 16 of them in the forward's table.
"""

BOTH = (
    GROUPS,
    CHANNELS,  # of input, in a group
    FILTERS,  # of a group
    PRODUCTS,  # whose sum is a pixel: taps of all channels of a group
    CELLS,  # of a window
) = range(5)

(
    TAPS,  # cells of the kernel
    SOURCE_STEP,  # from channel to channel in a block of (padded) images
    TARGET_STEP,  # from channel to channel in a block of pooled images
    PIXEL_TILES,
    PIXELS,  # table: offsets of the pixels of each tile in the source
    READY,  # table: windows that are complete after each tile
    CHUNKS,
    CHUNK,  # table: first and last channel, first and last tap of each chain of additions
    TAP,  # table: offset of each tap in the source
    CELL,  # table: for each window and cell the position of its pixel, or -1
    EMPTY,  # table: for each window whether it has no cell at all
    TARGET,  # table: offset of each window in the target
    CONV_BYTES,  # size of the convolution of a tile of filters
    PAD_RUNS,
    PAD_RUN,  # table: for each run of pixels that padding keeps together offset in the images, in the padded, and size
    PAD_BYTES,  # size of a block of padded images, 0 where nothing is padded
    TARGET_BYTES,  # size of a block of pooled images
    PACKED_BYTES,  # size of the weights as the forward reads them
    TILE_FILTERS,
    FORWARD_SIZE,
) = range(len(BOTH), len(BOTH) + 20)

(
    POOLED_ROWS,
    POOLED_COLUMNS,
    CELL_OFFSET,  # table: 0 for no cell, then for each cell offset of its pixel in the frame from the window's first
    CONV_ROWS,
    CONV_COLUMNS,
    CONV_ROW_STEP,  # from row to row of the convolution's pixels in the frame
    CONV_COLUMN_STEP,
    WINDOW_ROW_STEP,  # from row to row of windows in the frame
    WINDOW_COLUMN_STEP,
    ROWS,  # of the images, without padding
    COLUMNS,
    PITCH,  # from row to row of the frame
    FIRST,  # place of the images' first pixel in the frame
    PLANE_BYTES,  # size of a group's part of the frame
    FRAME_BYTES,
    VECTOR,  # table: offset of each vector of weights in the frame
    MASK,  # table: for each vector and lane whether it has a weight, in bytes
    TILES,  # of vectors
    ADD_WINNERS,  # address of the kernel that adds a list to a filter's sums
    ADD_WINDOWS,  # address of the kernel that adds a group's windows to the input's gradient, 0 if none is asked for
    LANE,  # table: offset of each weight among a filter's vectors
    ROW_BYTES,  # size of a filter's vectors
    BIAS_BYTES,
    DENSE_BYTES,  # size of a filter's gradient at the convolution's resolution
    LIST_BYTES,  # size of the places of a filter's pixels
    FIRST_STEPS,
) = range(len(BOTH), len(BOTH) + 26)

# Four steps each: from image to image, channel to channel, row to row, column to column.
SOURCE_STEPS, GRAD_STEPS, ARGMAX_STEPS, TARGET_STEPS, GRADIENTS_SIZE = range(FIRST_STEPS, FIRST_STEPS + 17, 4)
