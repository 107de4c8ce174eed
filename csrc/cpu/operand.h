// Tensors as the CPU kernels read them: a block at a time, in the accumulation type.
#pragma once
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cstring>

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
template <class A>
using Stream = void (*)(Dtype, const A*, int64_t n, void* out);

// An output, written a block at a time at offsets in elements.
template <class A>
class Output {
 public:
  // A large fresh output is written past the caches, which it would not fit.
  template <class Functions>
  Output(Tensor& tensor, const Functions& f, bool is_fresh = true)
      : data_(static_cast<char*>(tensor.mutable_data_ptr())),
        dtype_(dtype_of(tensor.scalar_type())),
        streams_(is_fresh && tensor.numel() * element_size(dtype_) >= kStreamed),
        store_(f.store),
        stream_(f.stream) {}

  // Where a block of adjacent elements is best computed: in its place, or in scratch memory.
  A* place(int64_t at, A* scratch) const {
    return dtype_ == kAccumulate<A> && !streams_ ? reinterpret_cast<A*>(at_offset(at)) : scratch;
  }
  // Moves a block to its place, if it is not there yet.
  void put(const A* values, int64_t stride, int64_t n, int64_t at) const {
    if (reinterpret_cast<const char*>(values) == at_offset(at)) return;
    if (streams_ && stride == 1) return stream_(dtype_, values, n, at_offset(at));
    store_(dtype_, values, stride, n, at_offset(at));
  }
  void zero(int64_t n, int64_t at) const {
    std::memset(at_offset(at), 0, static_cast<size_t>(n * element_size(dtype_)));
  }

 private:
  static constexpr int64_t kStreamed = 32 << 20;  // bytes

  char* at_offset(int64_t at) const { return data_ + at * element_size(dtype_); }

  char* data_;
  Dtype dtype_;
  bool streams_;
  Store<A> store_;
  Stream<A> stream_;
};

// Runs tasks in parallel; what they streamed is visible to every thread when this returns.
template <class Body>
void for_each_task(int64_t tasks, const Body& body) {
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) body(task);
#ifdef __SSE2__
    _mm_sfence();
#endif
  };
  if (tasks == 1) return run(0, 1);
  torch::stable::parallel_for(0, tasks, 1, run);
}

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
