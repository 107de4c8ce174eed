// What both bindings do around a launch.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../common/tensor.h"
#include "types.h"

namespace fused_losses {

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::Float;
    case ScalarType::Double: return Dtype::Double;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Half: return Dtype::Half;
    default: STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
  }
}

// Calls run with a null pointer of the element type.
template <class Run>
auto for_element_type(ScalarType type, const Run& run) {
  switch (dtype_of(type)) {
    case Dtype::Double: return run(static_cast<double*>(nullptr));
    case Dtype::BFloat16: return run(static_cast<BFloat16*>(nullptr));
    case Dtype::Half: return run(static_cast<Half*>(nullptr));
    default: return run(static_cast<float*>(nullptr));
  }
}

// While it lives, the tensor's device is the current one; kernels go to that device's current stream.
class Launches {
 public:
  explicit Launches(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fused_losses
