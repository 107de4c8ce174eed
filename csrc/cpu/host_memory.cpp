#include "../common/host_memory.h"

#include <torch/csrc/stable/library.h>

#include "../common/tensor.h"

namespace fused_losses {
namespace {

void empty_cache() { KeptMemory::instance().clear(); }

// An uninitialised CPU tensor, of kept memory where it is large.
Tensor empty_of_size(std::vector<int64_t> sizes, ScalarType dtype) {
  for (const int64_t size : sizes) STD_TORCH_CHECK(size >= 0, "sizes must be 0 or more, got ", size);
  STD_TORCH_CHECK(is_supported(dtype), "dtype must be float64, float32, bfloat16 or float16");
  const auto strides = contiguous_strides(sizes);
  return empty_on_cpu(sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), dtype);
}

}  // namespace
}  // namespace fused_losses

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) {
  m.def("empty(int[] size, ScalarType dtype) -> Tensor");
  m.def("empty_cache() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
  m.impl("empty", TORCH_BOX(&fused_losses::empty_of_size));
  m.impl("empty_cache", TORCH_BOX(&fused_losses::empty_cache));
}
