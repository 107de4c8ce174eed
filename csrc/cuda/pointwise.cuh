// Kernels of the pointwise family: one pass each way, over dense elements 16 bytes at a time or over any
// strides.
#pragma once
#include "memory.cuh"
#include "pointwise.h"

namespace fused_losses {

#include "../formulas/pointwise.h"

// Where one step's elements are in each operand, and their index among all.
struct Position {
  int64_t index, input, target, weight, pos_weight, upstream;
};

// An operand beside input and target, N elements at a time, or one element for all, or 1 where it is absent.
template <int N, class A>
FL_INLINE void load_factor(const PointwiseOperand& operand, bool constant, int64_t at, A (&out)[N]) {
  if (operand.data == nullptr || constant) {
    const A value = operand.data == nullptr ? A(1) : load_one<A>(operand.data, operand.dtype, 0);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = value;
  } else {
    load_any(operand.data, operand.dtype, at, out);
  }
}

// Every operand follows one order without gaps, or is a single number: `head` elements, `packs` aligned
// packs, and what is left.
template <class T>
struct Flat {
  bool weight_is_constant, pos_weight_is_constant, upstream_is_constant;
  bool packs_gradients;  // which never decide how sums are added up
  int64_t head, packs;

  template <class Body>
  __device__ __forceinline__ void for_each(const PointwiseProblem& p, Body&& body) const {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, packed = packs * kWidth<T>;
    for (int64_t i = thread; i < packs; i += step) body(at(head + i * kWidth<T>), Width<kWidth<T>>());
    for (int64_t i = thread; i < p.numel - packed; i += step) body(at(i < head ? i : i + packed), Width<1>());
  }

  FL_INLINE static Position at(int64_t i) { return {i, i, i, i, i, i}; }
};

struct Strided {
  static constexpr bool weight_is_constant = false, pos_weight_is_constant = false,
                        upstream_is_constant = false, packs_gradients = false;

  template <class Body>
  __device__ __forceinline__ void for_each(const PointwiseProblem& p, Body&& body) const {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.numel; i += step) {
      body(at(p, i), Width<1>());
    }
  }

  FL_INLINE static Position at(const PointwiseProblem& p, int64_t index) {
    Position position{index, 0, 0, 0, 0, 0};
#pragma unroll 1
    for (int d = p.dims - 1; d >= 0; --d) {
      const int64_t i = d > 0 ? split(index, p.sizes[d]) : index;
      position.input += i * p.input.strides[d];
      position.target += i * p.target.strides[d];
      position.weight += i * p.weight.strides[d];
      position.pos_weight += i * p.pos_weight.strides[d];
      position.upstream += i * p.upstream.strides[d];
    }
    return position;
  }
};

template <class F, class A>
FL_INLINE bool is_outside(A x, A t) {
  return std::is_same_v<F, BCE> && !(x >= A(0) && x <= A(1) && t >= A(0) && t <= A(1));
}

template <class F, class A>
FL_INLINE A value_of(A x, A t, A q, Params<A> params) {
  const A value = F::value(x, t, q, params);
  return is_outside<F>(x, t) ? kNaN<A> : value;
}

template <class F, class A>
FL_INLINE Gradient<A> gradient_of(A x, A t, A q, Params<A> params) {
  const Gradient<A> gradient = F::gradient(x, t, q, params);
  return is_outside<F>(x, t) ? Gradient<A>{kNaN<A>, kNaN<A>} : gradient;
}

// The upstream gradient of every element of a reduced loss.
template <class A>
FL_INLINE A shared_upstream(const PointwiseProblem& p) {
  const A upstream = p.upstream.data == nullptr ? A(1) : load_one<A>(p.upstream.data, p.upstream.dtype, 0);
  return upstream / static_cast<A>(p.divisor);
}

// What is asked for of the gradients of some elements; scale is the upstream of each.
template <class F, int N, class T, class A>
FL_INLINE void write_gradients(const A (&x)[N], const A (&t)[N], const A (&q)[N], const A (&scale)[N],
                               Params<A> params, const PointwiseGradients<T>& out, int64_t index,
                               bool as_packs) {
  A of_x[N], of_t[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Gradient<A> gradient = gradient_of<F>(x[k], t[k], q[k], params);
    of_x[k] = scale[k] * gradient.input;
    of_t[k] = scale[k] * gradient.target;
  }
  if (out.input != nullptr) store_pack(of_x, out.input + index, as_packs);
  if (out.target != nullptr) store_pack(of_t, out.target + index, as_packs);
}

// A block writes its elements' values, or the sum of them; the only block writes the loss at once.
template <class F, class T, class Access, bool kGradients>
__global__ void __launch_bounds__(kThreads, 2)
    pointwise_forward_kernel(const __grid_constant__ PointwiseProblem p, const Access access,
                             const PointwiseLoss loss, const PointwiseGradients<T> gradients) {
  using A = Accumulate<T>;
  const Params<A> params{static_cast<A>(p.a), static_cast<A>(p.b)};
  const T *input = static_cast<const T*>(p.input.data), *target = static_cast<const T*>(p.target.data);
  const A shared = kGradients ? shared_upstream<A>(p) : A(1);
  Total<double> total{0};
  access.for_each(p, [&](const Position& at, auto width) {
    constexpr int N = decltype(width)::value;
    A x[N], t[N], w[N], q[N], values[N];
    load(input + at.input, x);
    load(target + at.target, t);
    load_factor(p.weight, access.weight_is_constant, at.weight, w);
    load_factor(p.pos_weight, access.pos_weight_is_constant, at.pos_weight, q);
    A sum = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] = w[k] * value_of<F>(x[k], t[k], q[k], params);
      sum += values[k];
    }
    if (p.reduces) {
      total.value += static_cast<double>(sum);
    } else {
      store_any(values, loss.data, loss.dtype, at.index);
    }
    if constexpr (kGradients) {
#pragma unroll
      for (int k = 0; k < N; ++k) w[k] *= shared;
      write_gradients<F>(x, t, q, w, params, gradients, at.index, access.packs_gradients);
    }
  });
  if (!p.reduces) return;
  total = block_reduce(total);
  if (threadIdx.x > 0) return;
  if (gridDim.x == 1) {
    store_one(total.value / p.divisor, loss.data, loss.dtype, 0);
  } else {
    loss.partial[blockIdx.x] = total.value;
  }
}

static __global__ void __launch_bounds__(kThreads)
    pointwise_finish_kernel(const PointwiseLoss loss, int count, double divisor) {
  Total<double> total{0};
  for (int i = threadIdx.x; i < count; i += kThreads) total.value += loss.partial[i];
  total = block_reduce(total);
  if (threadIdx.x == 0) store_one(total.value / divisor, loss.data, loss.dtype, 0);
}

template <class F, class T, class Access>
__global__ void __launch_bounds__(kThreads, 2)
    pointwise_backward_kernel(const __grid_constant__ PointwiseProblem p, const Access access,
                              const PointwiseGradients<T> gradients) {
  using A = Accumulate<T>;
  if (p.skips_one && load_one<A>(p.upstream.data, p.upstream.dtype, 0) == A(1)) return;
  const Params<A> params{static_cast<A>(p.a), static_cast<A>(p.b)};
  const T *input = static_cast<const T*>(p.input.data), *target = static_cast<const T*>(p.target.data);
  const A shared = p.reduces ? shared_upstream<A>(p) : A(1);
  access.for_each(p, [&](const Position& at, auto width) {
    constexpr int N = decltype(width)::value;
    A x[N], t[N], w[N], q[N], g[N];
    load(input + at.input, x);
    load(target + at.target, t);
    load_factor(p.weight, access.weight_is_constant, at.weight, w);
    load_factor(p.pos_weight, access.pos_weight_is_constant, at.pos_weight, q);
    if (!p.reduces) load_factor(p.upstream, access.upstream_is_constant, at.upstream, g);
#pragma unroll
    for (int k = 0; k < N; ++k) w[k] *= p.reduces ? shared : g[k];
    write_gradients<F>(x, t, q, w, params, gradients, at.index, access.packs_gradients);
  });
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::Double ? 8 : dtype == Dtype::Float ? 4 : 2; }

// Decides, on the host, how the kernels walk through one problem.
class PointwisePlan {
 public:
  explicit PointwisePlan(const PointwiseProblem& problem) : p_(problem) {}

  bool is_flat() const {
    return follows(p_.input) && follows(p_.target) && is_simple(p_.weight) && is_simple(p_.pos_weight) &&
           (p_.reduces || is_simple(p_.upstream));
  }

  // Packs start where the input is aligned, if everything else is aligned there too.
  template <class T>
  Flat<T> flat(const void* values, Dtype dtype, const PointwiseGradients<T>& gradients) const {
    Flat<T> access{is_constant(p_.weight), is_constant(p_.pos_weight), is_constant(p_.upstream), false, 0, 0};
    const auto misaligned = reinterpret_cast<uintptr_t>(p_.input.data) % kWideAccess;
    const int64_t head = misaligned == 0 ? 0 : static_cast<int64_t>((kWideAccess - misaligned) / sizeof(T));
    const auto fits = [&](const void* data, Dtype dtype) {
      const int64_t element = size_of(dtype), bytes = element * kWidth<T>;
      const auto first = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(head * element);
      return data == nullptr || first % (bytes < kWideAccess ? bytes : kWideAccess) == 0;
    };
    const auto operand_fits = [&](const PointwiseOperand& o) {
      return is_constant(o) || fits(o.data, o.dtype);
    };
    const bool aligned = operand_fits(p_.target) && operand_fits(p_.weight) && operand_fits(p_.pos_weight) &&
                         operand_fits(p_.upstream) && fits(values, dtype);
    access.packs_gradients = fits(gradients.input, p_.input.dtype) && fits(gradients.target, p_.input.dtype);
    if (aligned && head < p_.numel) access.head = head, access.packs = (p_.numel - head) / kWidth<T>;
    return access;
  }

 private:
  bool follows(const PointwiseOperand& operand) const {
    int64_t expected = 1;
    for (int d = p_.dims - 1; d >= 0; --d) {
      if (p_.sizes[d] != 1 && operand.strides[d] != expected) return false;
      expected *= p_.sizes[d];
    }
    return true;
  }
  bool is_constant(const PointwiseOperand& operand) const {
    for (int d = 0; d < p_.dims; ++d) {
      if (p_.sizes[d] != 1 && operand.strides[d] != 0) return false;
    }
    return true;
  }
  bool is_simple(const PointwiseOperand& operand) const {
    return operand.data == nullptr || is_constant(operand) || follows(operand);
  }

  const PointwiseProblem& p_;
};

template <class T>
cudaError_t pointwise_backward(Formula formula, const PointwiseProblem& problem,
                               const PointwiseGradients<T>& gradients, cudaStream_t stream, int max_blocks) {
  const PointwisePlan plan(problem);
  const int blocks = pointwise_blocks(problem.numel, max_blocks);
  const auto run = [&](auto flat_kernel, auto strided_kernel) {
    if (!plan.is_flat()) return launch(strided_kernel, blocks, 0, stream, problem, Strided{}, gradients);
    const auto access = plan.template flat<T>(nullptr, problem.input.dtype, gradients);
    return launch(flat_kernel, blocks, 0, stream, problem, access, gradients);
  };
  switch (formula) {
#define FL_CASE(F, name)                                                \
  case Formula::F:                                                      \
    return run(&pointwise_backward_kernel<fused_losses::F, T, Flat<T>>, \
               &pointwise_backward_kernel<fused_losses::F, T, Strided>);
    FL_POINTWISE_FORMULAS(FL_CASE)
#undef FL_CASE
  }
  return cudaErrorInvalidValue;
}

// With gradients, elements are dense.
template <class T, bool kGradients>
cudaError_t launch_forward(Formula formula, const PointwiseProblem& problem, const PointwiseLoss& loss,
                           const PointwiseGradients<T>& gradients, int blocks, cudaStream_t stream) {
  const PointwisePlan plan(problem);
  const auto run = [&](auto flat_kernel, auto strided_kernel) {
    constexpr size_t shared = block_reduce_bytes<Total<double>>;
    if (!plan.is_flat())
      return launch(strided_kernel, blocks, shared, stream, problem, Strided{}, loss, gradients);
    const auto access = plan.template flat<T>(problem.reduces ? nullptr : loss.data, loss.dtype, gradients);
    return launch(flat_kernel, blocks, shared, stream, problem, access, loss, gradients);
  };
  switch (formula) {
#define FL_CASE(F, name)                                                           \
  case Formula::F:                                                                 \
    return run(&pointwise_forward_kernel<fused_losses::F, T, Flat<T>, kGradients>, \
               &pointwise_forward_kernel<fused_losses::F, T, Strided, false>);
    FL_POINTWISE_FORMULAS(FL_CASE)
#undef FL_CASE
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t pointwise_forward(Formula formula, const PointwiseProblem& problem, const PointwiseLoss& loss,
                              const PointwiseGradients<T>& gradients, cudaStream_t stream, int max_blocks) {
  constexpr bool kCan = !std::is_same_v<T, Half>;  // whose losses are scaled: nobody asks for it
  const int blocks = pointwise_blocks(problem.numel, max_blocks);
  const bool asked = gradients.input != nullptr || gradients.target != nullptr;
  const bool at_once = asked && kCan && PointwisePlan(problem).is_flat();
  const auto run = at_once ? &launch_forward<T, kCan> : &launch_forward<T, false>;
  cudaError_t error = run(formula, problem, loss, gradients, blocks, stream);
  if (error == cudaSuccess && problem.reduces && blocks > 1) {
    error = launch(&pointwise_finish_kernel, 1, block_reduce_bytes<Total<double>>, stream, loss, blocks,
                   problem.divisor);
  }
  if (error != cudaSuccess || !asked || at_once) return error;
  return pointwise_backward<T>(formula, problem, gradients, stream, max_blocks);
}

#define FL_INSTANTIATE_POINTWISE(T)                                                                          \
  template cudaError_t pointwise_forward<T>(Formula, const PointwiseProblem&, const PointwiseLoss&,          \
                                            const PointwiseGradients<T>&, cudaStream_t, int);                \
  template cudaError_t pointwise_backward<T>(Formula, const PointwiseProblem&, const PointwiseGradients<T>&, \
                                             cudaStream_t, int);

}  // namespace fused_losses
