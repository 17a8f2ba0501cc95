"""What the workers of one call share: names for the places of a table of integers, which the launcher fills."""

(
    WORKERS,  # counter: workers that have begun
    TAKEN,  # counter: tasks that a worker has taken
    DONE,  # counter: tasks that are done
    TASKS,
    BLOCKS,  # of 16 images in a task
    KERNEL,  # address of the kernel of a block
    EXCHANGE,  # address of the kernel that turns images into lanes and back
    PLAN,  # address of the plan
    IMAGES,  # of the batch
    INPUT,
    INPUT_STEP,  # bytes from image to image, here and below
    WEIGHT,
    BIAS,
    OUTPUT,  # or its gradient
    OUTPUT_STEP,
    ARGMAX,
    ARGMAX_STEP,
    GRAD_INPUT,  # 0 if not asked for
    GRAD_INPUT_STEP,
    SUMS,  # each task's sums of the gradients of weight and bias; 0 if neither is asked for
    SUMS_STEP,  # bytes from task to task
    GRAD_WEIGHT,
    GRAD_BIAS,
    SCRATCH,
    SCRATCH_BYTES,  # of a worker
    SIZE,
) = range(26)
