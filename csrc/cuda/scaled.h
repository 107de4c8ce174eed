// A gradient that was summed in fp32, on its way to its own dtype. Free of torch's tensors.
#pragma once
#include "types.h"

namespace fused_losses {

// out = x times one number, in any dtype; all of it without gaps.
cudaError_t scaled(const float* x, int64_t numel, const void* factor, Dtype factor_dtype, void* out,
                   Dtype out_dtype, cudaStream_t stream);

}  // namespace fused_losses
