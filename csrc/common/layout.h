// One order of iteration for tensors of one shape, with as few dimensions as their strides allow.
#pragma once
#include "tensor.h"

namespace fused_losses {

constexpr int kMaxOperands = 6;

// sizes[0] is the slowest dimension; strides[operand][dimension] in elements.
struct Layout {
  std::vector<int64_t> sizes;
  std::array<std::vector<int64_t>, kMaxOperands> strides;
  int64_t numel = 0;

  // Whether an operand's elements follow each other in this order.
  bool is_flat(int operand) const {
    int64_t expected = 1;
    for (size_t d = sizes.size(); d-- > 0; expected *= sizes[d]) {
      if (strides[operand][d] != expected) return false;
    }
    return true;
  }

  bool is_constant(int operand) const {
    return std::all_of(strides[operand].begin(), strides[operand].end(), [](int64_t s) { return s == 0; });
  }
};

// The order is the first tensor's in memory; neighbouring dimensions that are one for every tensor merge.
inline Layout joint_layout(const Tensor* const* tensors, int count) {
  const Tensor& leader = *tensors[0];
  Layout layout;
  layout.numel = leader.numel();
  for (const int64_t dimension : memory_order(leader)) {
    const int64_t size = leader.sizes()[dimension];
    bool merges = !layout.sizes.empty();
    for (int i = 0; i < count && merges; ++i) {
      merges = layout.strides[i].back() == size * tensors[i]->strides()[dimension];
    }
    for (int i = 0; i < count; ++i) {
      if (merges) layout.strides[i].pop_back();
      layout.strides[i].push_back(tensors[i]->strides()[dimension]);
    }
    if (merges) {
      layout.sizes.back() *= size;
    } else {
      layout.sizes.push_back(size);
    }
  }
  return layout;
}

}  // namespace fused_losses
