"""What a chain's kernels are told of each link, and of the chain: names for the places of tables of integers.

Offsets named ``..._AT`` lead from the start of a worker's scratch, of a block's record (what one block of 16 images
keeps between its layers, and in training until the backward), or of a task's sums.
"""

(
    LINEAR,  # whether this is a linear layer
    RELU,  # whether relu follows it
    INPUTS,  # numbers of an image that come in
    OUTPUTS,  # numbers of an image that go out
    PLAN,  # of a convolution
    FORWARD,  # address of a convolution's kernel
    BACKWARD,
    WEIGHT,
    BIAS,  # 0 if there is none
    PACKED_AT,  # in the scratch: weights as the forward or the backward reads them
    PADDED_AT,  # in the scratch: padded images
    TARGET_AT,  # in the record: what goes out
    PASSES,  # whether that is in the scratch instead: no backward needs it
    ARGMAX_AT,  # in the record
    GRAD_AT,  # in the scratch: gradient of what comes in
    WANTED,  # whether weight or bias need a gradient
    PARTIAL_AT,  # in the scratch: sums of a convolution's gradients, image by image
    SUMS_AT,  # in the sums: gradient of the weight
    SUMS_STEP,  # bytes from row to row of it
    BIAS_SUMS_AT,  # in the sums: gradient of the bias
    SIZE,
) = range(21)

(
    WORKERS,  # counter: workers that have begun
    TAKEN,  # counter: tasks, blocks or rows that a worker has taken
    TASKS,
    BLOCKS,  # of 16 images in a task
    EXCHANGE,  # address of the kernel that turns images into lanes and back
    IMAGES,  # of the batch
    INPUT,
    INPUT_STEP,  # bytes from image to image, here and below
    OUTPUT,  # or its gradient
    OUTPUT_STEP,
    GRAD_INPUT,  # 0 if not asked for
    GRAD_INPUT_STEP,
    RECORD,  # the blocks' records; 0 where each worker keeps one in its scratch
    RECORD_BYTES,
    SCRATCH,
    SCRATCH_BYTES,  # of a worker
    RECORD_AT,  # in the scratch
    CONV_AT,  # in the scratch: a convolution, or its gradient
    ROWS_AT,  # in the scratch: what comes into a linear layer, image by image
    OUTPUT_GRAD_AT,  # in the scratch: gradient of the output
    SUMS,  # each task's sums of the parameters' gradients
    SUMS_BYTES,  # from task to task
    FIRST_WANTED,  # the first link whose parameters need a gradient, or 0 if the input does
    LINKS,  # how many follow; each has a table of `SIZE` integers
    HEAD,
) = range(25)

(
    TARGET,  # of a parameter's gradient
    SOURCE,  # in the sums
    WIDTH,  # numbers of a row
    STEP,  # bytes from row to row in the sums
    FIRST,  # row
    LAST,
    PIECE,
) = range(7)
"""A piece of a parameter: some rows whose sums over all tasks one worker takes."""

PROGRAM_HEADER = 3
"""Integers before the steps of a chain of a few images: how many run once, for each image, and once at the end."""
PROGRAM_STEP = 1 + 3 * 10
"""Integers of such a step: a kernel's address, then for each of ten arguments a base, an offset, and a distance.

The distance is added to the offset from image to image. A C function ignores arguments that it does not take.
"""
