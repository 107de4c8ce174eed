// Tensors through the stable ABI: allocation, and operands that share one order of iteration.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fused_losses {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum class Reduction { None, Mean, Sum };

inline Reduction reduction_of(const std::string& name) {
  if (name == "mean") return Reduction::Mean;
  if (name == "sum") return Reduction::Sum;
  STD_TORCH_CHECK(name == "none", "reduction must be none, mean or sum, got ", name);
  return Reduction::None;
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline ScalarType accumulate_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Long ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto x = a.strides(), y = b.strides();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// Faulting in a large fresh tensor costs more than computing it; huge pages make that cheap.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20;
  if (bytes < static_cast<int64_t>(4 * page)) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// The allocation itself, without the dispatcher's boxed call: a tiny loss is mostly overhead.
inline Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t ndim, ScalarType dtype,
                    const Tensor& like) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t index = device_type == aoti_torch_device_type_cpu() ? 0 : like.get_device_index();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      ndim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device_type, index, &handle));
  Tensor result(handle);
  if (device_type == aoti_torch_device_type_cpu()) {
    ask_for_huge_pages(result.data_ptr(), result.numel() * element_size(dtype));
  }
  return result;
}

inline Tensor empty_contiguous(std::vector<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return empty(sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), dtype, like);
}

inline Tensor empty_scalar(ScalarType dtype, const Tensor& like) {
  return empty(nullptr, nullptr, 0, dtype, like);
}

// Dimensions from the slowest to the fastest in memory; those of size 1 are left out.
inline std::vector<int64_t> memory_order(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<int64_t> order;
  for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i) {
    if (sizes[i] != 1) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

// Whether the tensor fills its memory without gaps or overlaps.
inline bool is_dense(const Tensor& tensor, const std::vector<int64_t>& order) {
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (tensor.strides()[order[i]] != expected) return false;
    expected *= tensor.sizes()[order[i]];
  }
  return true;
}

// torch.empty_like in another dtype or the same: a dense layout is kept.
inline Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  const auto sizes = tensor.sizes();
  if (tensor.numel() > 0 && is_dense(tensor, memory_order(tensor))) {
    return empty(sizes.data(), tensor.strides().data(), static_cast<int64_t>(sizes.size()), dtype, tensor);
  }
  // How torch lays out the rest has rules of its own; it is asked for them.
  const Tensor rules = torch::stable::empty_like(tensor);
  return empty(sizes.data(), rules.strides().data(), static_cast<int64_t>(sizes.size()), dtype, tensor);
}

}  // namespace fused_losses
