"""Triton kernels of fused_losses, installed as ``fused_losses.triton_kernels``; imports no Triton by itself."""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is the source of fused_losses.triton_kernels, not Triton's triton_kernels package; "
        "keep the root of the repository off sys.path"
    )
