// Tensors as the CPU kernels read them: a block at a time, in the accumulation type.
#pragma once
#include "../common/layout.h"

namespace fused_losses {

enum class Dtype { Float, Double, BFloat16, Half };

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::Float;
    case ScalarType::Double: return Dtype::Double;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Half: return Dtype::Half;
    default: STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
  }
}

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::Double ? 8 : dtype == Dtype::Float ? 4 : 2;
}

template <class A>
constexpr Dtype kAccumulate = sizeof(A) == 8 ? Dtype::Double : Dtype::Float;

template <class A>
using Load = void (*)(Dtype, const void*, int64_t stride, int64_t n, A* out);
template <class A>
using Store = void (*)(Dtype, const A*, int64_t stride, int64_t n, void* out);

// One tensor, read a block at a time in the order of a layout.
class Operand {
 public:
  Operand() = default;
  Operand(const Tensor& tensor, const Layout& layout, int index)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        dtype_(dtype_of(tensor.scalar_type())),
        layout_(&layout),
        strides_(&layout.strides[index]),
        flat_(layout.is_flat(index)) {}

  // Elements [begin, begin + n): the memory itself where it can be used as it is, else a converted copy.
  template <class A>
  const A* block(int64_t begin, int64_t n, Load<A> load, A* scratch) const {
    if (flat_) {
      const char* source = data_ + begin * element_size(dtype_);
      if (dtype_ == kAccumulate<A>) return reinterpret_cast<const A*>(source);
      load(dtype_, source, 1, n, scratch);
    } else {
      gather(begin, n, load, scratch);
    }
    return scratch;
  }

 private:
  template <class A>
  void gather(int64_t begin, int64_t n, Load<A> load, A* scratch) const {
    const auto& sizes = layout_->sizes;
    const int64_t inner = sizes.back(), stride = strides_->back();
    for (int64_t done = 0; done < n;) {
      const int64_t position = begin + done, column = position % inner;
      int64_t offset = column * stride, row = position / inner;
      for (size_t d = sizes.size() - 1; d-- > 0; row /= sizes[d]) offset += row % sizes[d] * (*strides_)[d];
      const int64_t run = std::min(n - done, inner - column);
      load(dtype_, data_ + offset * element_size(dtype_), stride, run, scratch + done);
      done += run;
    }
  }

  const char* data_ = nullptr;
  Dtype dtype_ = Dtype::Float;
  const Layout* layout_ = nullptr;
  const std::vector<int64_t>* strides_ = nullptr;
  bool flat_ = false;
};

}  // namespace fused_losses
