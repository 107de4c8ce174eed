// The CUDA operators over emulated kernels, for CPU tensors and under a name of their own: what a binding
// makes of shapes and strides is then tested with real tensors.
#include <torch/csrc/stable/library.h>

#include "../../csrc/cuda/device.h"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, device, m) \
  _STABLE_TORCH_LIBRARY_IMPL(emulated_losses, CPU, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_FRAGMENT
#define STABLE_TORCH_LIBRARY_FRAGMENT(name, m) _STABLE_TORCH_LIBRARY_FRAGMENT(emulated_losses, m, C10_UID)

#include "../../csrc/ops/divergence.cpp"
#include "../../csrc/ops/linear.cpp"
#include "../../csrc/ops/pointwise.cpp"
#include "../../csrc/ops/softmax.cpp"

#include "../../csrc/cuda/divergence.cpp"
#include "../../csrc/cuda/linear.cpp"
#include "../../csrc/cuda/pointwise.cpp"
#include "../../csrc/cuda/scaled.cpp"
#include "../../csrc/cuda/softmax.cpp"

namespace fused_losses {
alignas(16) unsigned char block_memory[emulation::kMostSharedBytes];
static const bool shared_memory_is_known = (emulation::use_shared_memory(block_memory), true);
}  // namespace fused_losses

// There is no device to guard, no stream, and no error but a launch that was refused.
extern "C" {
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                        char** message) {
  *message = error == cudaSuccess ? nullptr : strdup("a launch was refused");
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
}
