// Tensors of shape (C), (N, C) or (N, C, d1, ...) as classes, pixels, and whatever does not merge into
// pixels.
#pragma once
#include "tensor.h"

namespace fused_losses {

// Rows are numbered in the order of the labels: pixels are the fastest of the row dimensions.
struct ClassView {
  struct Strides {
    int64_t classes = 0, pixels = 0;
    std::vector<int64_t> outer;
  };

  int64_t classes = 1, pixels = 1, outer_count = 1;
  std::vector<int64_t> outer;
  std::vector<Strides> of;

  // Where an outer position of a tensor starts, in elements.
  int64_t offset(int tensor, int64_t position) const {
    int64_t result = 0;
    for (size_t d = outer.size(); d-- > 0; position /= outer[d]) {
      result += position % outer[d] * of[tensor].outer[d];
    }
    return result;
  }

  bool classes_are_adjacent() const {
    return std::all_of(of.begin(), of.end(), [](const Strides& s) { return s.classes == 1; });
  }
};

// Tensors of one shape; row dimensions merge where they are one in memory for all of them.
inline ClassView class_view(const std::vector<const Tensor*>& tensors) {
  const Tensor& first = *tensors[0];
  const int64_t class_dimension = first.dim() == 1 ? 0 : 1;
  ClassView view;
  view.classes = first.sizes()[class_dimension];
  view.of.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) view.of[i].classes = tensors[i]->strides()[class_dimension];
  for (int64_t d = 0; d < first.dim(); ++d) {
    const int64_t size = first.sizes()[d];
    if (d == class_dimension || size == 1) continue;
    bool merges = !view.outer.empty();
    for (size_t i = 0; i < tensors.size() && merges; ++i) {
      merges = view.of[i].outer.back() == size * tensors[i]->strides()[d];
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (merges) view.of[i].outer.pop_back();
      view.of[i].outer.push_back(tensors[i]->strides()[d]);
    }
    if (merges) {
      view.outer.back() *= size;
    } else {
      view.outer.push_back(size);
    }
  }
  if (!view.outer.empty()) {
    view.pixels = view.outer.back();
    view.outer.pop_back();
    for (auto& strides : view.of) {
      strides.pixels = strides.outer.back();
      strides.outer.pop_back();
    }
  }
  for (const int64_t size : view.outer) view.outer_count *= size;
  return view;
}

}  // namespace fused_losses
