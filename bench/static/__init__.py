"""What kernels cost by their machine code, without a GPU.

``python -m bench.static`` compiles whatever fastlenet's public path launches (`fake_driver`), counts what each launch
executes (`sass`), and turns counts into nanoseconds (`model`). **Nothing is measured.** `launches` holds the rows of
LeNet's kernels and of other shapes, `convolution` those of any convolution, `committed` compares with the committed
report.

What stock PyTorch computes, such as fc3's product where LeNet takes stock's, the loss and the optimizer, is no Triton
kernel and not counted.
"""
