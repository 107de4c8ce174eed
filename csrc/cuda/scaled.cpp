// The last step of a head's gradients on a GPU. Nothing here waits for the GPU.
#include "scaled.h"

#include <torch/csrc/stable/library.h>

#include "device.h"

namespace fused_losses {
namespace {

Tensor scaled_cuda(const Tensor& x, const Tensor& factor, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "x must be float32 and contiguous");
  STD_TORCH_CHECK(factor.numel() == 1 && is_supported(factor.scalar_type()) && is_supported(dtype),
                  "factor must be one number, dtype floating");
  STD_TORCH_CHECK(factor.device() == x.device(), "factor must be on the device of x");
  const Launches launches(x);
  Tensor result = empty_like(x, dtype);
  if (x.numel() == 0) return result;
  STD_CUDA_CHECK(scaled(static_cast<const float*>(x.const_data_ptr()), x.numel(), factor.const_data_ptr(),
                        dtype_of(factor.scalar_type()), result.mutable_data_ptr(), dtype_of(dtype),
                        launches.stream()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) { m.impl("scaled", TORCH_BOX(&scaled_cuda)); }

}  // namespace fused_losses
