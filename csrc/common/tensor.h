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
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "host_memory.h"

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

inline bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  return sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
}

// Whether the last of two dimensions has its elements one after the other.
inline bool has_adjacent_columns(const Tensor& tensor) {
  return tensor.dim() == 2 && (tensor.strides()[1] == 1 || tensor.sizes()[1] <= 1 || tensor.numel() == 0);
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto x = a.strides(), y = b.strides();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

inline int32_t code_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline int32_t device_type_of(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

// The allocation itself, without the dispatcher's boxed call: a tiny loss is mostly overhead.
inline Tensor allocate(const int64_t* sizes, const int64_t* strides, int64_t ndim, ScalarType dtype,
                       int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides, code_of(dtype), device_type, device_index, &handle));
  return Tensor(handle);
}

// A CPU tensor without gaps, of kept memory where there is some.
inline Tensor allocate_large(const int64_t* sizes, const int64_t* strides, int64_t ndim, ScalarType dtype,
                             int64_t bytes) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  KeptMemory::Block* block = KeptMemory::instance().take(bytes);
  if (block == nullptr) {
    constexpr int64_t one = 1;
    const Tensor owner = allocate(&bytes, &one, 1, ScalarType::Byte, cpu, 0);
    block = new KeptMemory::Block{owner, owner.data_ptr(), bytes};
    advise(block->data, bytes, MADV_HUGEPAGE);
  }
  const auto give_back = [](void*, void* lent) {
    KeptMemory::instance().give_back(static_cast<KeptMemory::Block*>(lent));
  };
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error =
      torch_from_blob(block->data, ndim, sizes, strides, 0, code_of(dtype), cpu, -1, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, give_back, block);
  if (error != AOTI_TORCH_SUCCESS) delete block;
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

inline Tensor empty_on_cpu(const int64_t* sizes, const int64_t* strides, int64_t ndim, ScalarType dtype) {
  const int64_t elements = std::accumulate(sizes, sizes + ndim, int64_t{1}, std::multiplies<int64_t>());
  const int64_t bytes = elements * element_size(dtype);
  if (bytes >= kLargeTensor && KeptMemory::is_on()) return allocate_large(sizes, strides, ndim, dtype, bytes);
  Tensor result = allocate(sizes, strides, ndim, dtype, aoti_torch_device_type_cpu(), 0);
  if (bytes >= kLargeTensor) advise(result.data_ptr(), bytes, MADV_HUGEPAGE);
  return result;
}

// An uninitialised tensor without gaps, on another one's device.
inline Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t ndim, ScalarType dtype,
                    const Tensor& like) {
  const int32_t device_type = device_type_of(like);
  if (device_type == aoti_torch_device_type_cpu()) return empty_on_cpu(sizes, strides, ndim, dtype);
  return allocate(sizes, strides, ndim, dtype, device_type, like.get_device_index());
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return strides;
}

inline Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  const auto strides = contiguous_strides(sizes);
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
