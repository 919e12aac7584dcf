"""What runs on the GPU: Triton kernels, and nothing else.

All keep to what Triton's interpreter and its compilers for NVIDIA and AMD have in common: values are turned to float32
when they are loaded, bits are counted by arithmetic, there is no assembly and no library function of a vendor. Lengths
and sizes are run-time arguments, so that no new shape compiles anew; only what changes the code is ``constexpr``.
"""
