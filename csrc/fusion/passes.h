// What the source of a fused loss is made of: lanes along collapsed axes, blocks of them, and what reduces
// blocks. Only a generated source includes this, compiled for one instruction set; everything in it stays
// inside.
#pragma once
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cstdint>
#undef _GLIBCXX_USE_STD_SPEC_FUNCS  // an eighth of a build is libstdc++'s <cmath> with functions nobody calls
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

namespace {

// What is called for a block or a pass, not for an element: inlined, it would only make builds longer.
#define FL_APART __attribute__((noinline))

constexpr int64_t kBlock = 1024;  // lanes that are computed together

// Lanes are computed in whole vectors: a loop then has no rest, which takes as long to build and, in short
// blocks, to run. What is beyond a block's own lanes is anything, and is stored in scratch memory alone.
constexpr int64_t kWhole = 16;
constexpr int64_t whole(int64_t n) { return (n + kWhole - 1) & -kWhole; }

// Something usual beyond a block's own lanes: a denormal number would take long.
template <class A>
FL_APART A* padded(A* block, int64_t n) {
  for (int64_t i = n; i < whole(n); ++i) block[i] = block[n - 1];
  return block;
}

#include "../common/numerics.h"
#include "../common/low_precision.h"
#include "../common/stream.h"
#include "wide.h"
#include "functions.h"
#include "reductions.h"
#include "blocks.h"

constexpr int kMaxRank = 16;
constexpr int64_t kTask = 64 * kBlock;  // elements of a task: fixed, so that no result depends on the threads
constexpr int64_t kStreamed = 32 << 20;  // bytes of an output that is written past the caches
constexpr int64_t kShortRun = 256;       // lanes below which a block has several runs

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
// Whether an index is in [0, size): one comparison vectorises where two do not.
FL_INLINE bool lies_in(int64_t index, int64_t size) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
}
// A lane's number, or one on its side of all lanes.
FL_INLINE int32_t lane_of(int64_t lane) {
  return static_cast<int32_t>(lane < 0 ? -1 : lane > kBlock ? kBlock : lane);
}
// Negative exactly where it is not: what adds up over lanes in one operation.
FL_INLINE int64_t straying(int64_t index, int64_t size) {
  return index | static_cast<int64_t>(static_cast<uint64_t>(size) - 1 - static_cast<uint64_t>(index));
}
constexpr uint64_t inverse_of(uint64_t odd) {  // modulo 2^64
  uint64_t result = odd;  // its last three bits are right already, and twice as many after each step
  for (int step = 0; step < 5; ++step) result *= 2 - odd * result;
  return result;
}
// a / divisor where that is whole and not negative; elsewhere no index of anything. Divisions do not
// vectorise.
template <int64_t divisor>
FL_INLINE int64_t exact_quotient(int64_t a) {
  constexpr int shift = __builtin_ctzll(divisor);
  const uint64_t product = static_cast<uint64_t>(a) * inverse_of(divisor >> shift);
  return static_cast<int64_t>(shift == 0 ? product : product >> shift | product << (64 - shift) % 64);
}
inline int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? abs_(a) : common_divisor(b, a % b); }
inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// torch_parallel_for of torch's stable C interface.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Runs tasks on torch's threads; what they streamed is visible to every thread when this returns.
template <class Body>
void parallel(ParallelFor parallel_for, int64_t tasks, const Body& body) {
  const auto run = [](int64_t first, int64_t last, void* context) {
    for (int64_t task = first; task < last; ++task) (*static_cast<const Body*>(context))(task);
#ifdef __SSE2__
    _mm_sfence();
#endif
  };
  void* context = const_cast<void*>(static_cast<const void*>(&body));
  if (tasks <= 1) return run(0, tasks, context);
  parallel_for(0, tasks, 1, run, context);
}

// Uninitialised memory of one call.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count)
      : data_(static_cast<T*>(std::malloc(static_cast<size_t>(most(count, 1)) * sizeof(T)))) {}
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data_); }
  T* data() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_;
};

struct Strides {
  int64_t of[kMaxRank];
};

// Axes that lanes run along together, in the order that suits the strides of what is read and written.
struct Lanes {
  int rank = 0;
  int axis[kMaxRank] = {};
  int64_t extent[kMaxRank] = {}, numel = 1;
  int64_t run = 1, step = 1;  // lanes that are one in all of the memory, and those of a block

  FL_APART Lanes(std::initializer_list<int64_t> extents, std::initializer_list<const Strides*> operands,
                 bool keeps_order) {
    int64_t weight[kMaxRank];
    int index = 0;
    for (const int64_t size : extents) {
      numel *= size;
      int64_t total = 0;
      for (const Strides* strides : operands) total += keeps_order ? 0 : abs_(strides->of[index]);
      int at = rank;
      if (size != 1) {
        for (; at > 0 && weight[at - 1] < total; --at) {
          axis[at] = axis[at - 1], extent[at] = extent[at - 1], weight[at] = weight[at - 1];
        }
        axis[at] = index, extent[at] = size, weight[at] = total, ++rank;
      }
      ++index;
    }
    int slowest = rank > 0 ? rank - 1 : 0;
    while (slowest > 0 && are_one(slowest - 1, operands)) --slowest;
    for (int k = slowest; k < rank; ++k) run *= extent[k];
    if (run < kShortRun) run = numel;
    step = ceiling(ceiling(run, most(1, ceiling(run, kBlock))), 16) * 16;
  }

  // Where the block that begins at a lane ends: where a run does, at the latest.
  int64_t end(int64_t begin, int64_t width = kBlock) const {
    return least(begin + least(step, width), run == numel ? numel : (begin / run + 1) * run);
  }

 private:
  bool are_one(int slow, std::initializer_list<const Strides*> operands) const {
    for (const Strides* strides : operands) {
      if (strides->of[axis[slow]] != extent[slow + 1] * strides->of[axis[slow + 1]]) return false;
    }
    return true;
  }
};

// Where lanes start.
struct Seek {
  int64_t position, offset, column;
};

// Offsets along lanes; axes that are one in memory are one here.
class Steps {
 public:
  FL_APART Steps(const Lanes& lanes, const Strides& strides) {
    for (int k = 0; k < lanes.rank; ++k) {
      const int64_t size = lanes.extent[k], step = strides.of[lanes.axis[k]];
      if (k > 0 && stride_[last_] == size * step) {
        extent_[last_] *= size, stride_[last_] = step;
      } else {
        last_ = k == 0 ? 0 : last_ + 1;
        extent_[last_] = size, stride_[last_] = step;
      }
    }
  }
  Seek seek(int64_t position) const {
    return last_ == 0 ? Seek{position, position * stride_[0], position} : seek_among(position);
  }
  bool is_adjacent(const Seek& at, int64_t n) const {
    return stride_[last_] == 1 && (last_ == 0 || at.column + n <= extent_[last_]);
  }
  // Calls run(done, count, offset, stride) for pieces of n lanes along the fastest axis.
  template <class Run>
  void for_each_run(const Seek& at, int64_t n, const Run& run) const {
    Seek now = at;
    for (int64_t done = 0;;) {
      const int64_t count = last_ == 0 ? n : least(n - done, extent_[last_] - now.column);
      run(done, count, now.offset, stride_[last_]);
      done += count;
      if (done >= n) return;
      now = seek(at.position + done);
    }
  }
  // The offsets themselves.
  FL_APART const int64_t* block(const Seek& at, int64_t n, int64_t base, int64_t* scratch) const {
    for_each_run(at, n, [&](int64_t done, int64_t count, int64_t offset, int64_t stride) {
      for (int64_t i = 0; i < count; ++i) scratch[done + i] = base + offset + i * stride;
    });
    return scratch;
  }

 private:
  FL_APART Seek seek_among(int64_t position) const {
    int64_t row = position / extent_[last_];
    const int64_t column = position - row * extent_[last_];
    int64_t offset = column * stride_[last_];
    for (int d = last_; d-- > 0; row /= extent_[d]) offset += row % extent_[d] * stride_[d];
    return {position, offset, column};
  }

  int last_ = 0;
  int64_t extent_[kMaxRank] = {1}, stride_[kMaxRank] = {1};
};

// Calls run(stride), with a constant where loops over memory then vectorise.
template <class Run>
FL_INLINE void with_stride(int64_t stride, const Run& run) {
  switch (stride) {
    case 1: return run(std::integral_constant<int64_t, 1>());
    case 2: return run(std::integral_constant<int64_t, 2>());
    case 3: return run(std::integral_constant<int64_t, 3>());
    case 4: return run(std::integral_constant<int64_t, 4>());
    case -1: return run(std::integral_constant<int64_t, -1>());
    default: return run(stride);
  }
}

// A tensor as lanes read it.
template <class T>
class View : public Steps {
 public:
  // `last` is where the tensor's last element is.
  View(const T* data, const Lanes& lanes, const Strides& strides, int64_t last)
      : Steps(lanes, strides), data_(data), last_(last) {}

  // n lanes from base on: the memory itself where it can be used as it is, else a converted copy.
  template <class A>
  const A* block(const Seek& at, int64_t n, int64_t base, A* scratch) const {
    if constexpr (std::is_same_v<T, A>) {
      const int64_t start = base + at.offset;
      if (is_adjacent(at, n) && (n == whole(n) || start + whole(n) <= last_ + 1)) return data_ + start;
    }
    copy(at, n, data_ + base, scratch);
    return padded(scratch, n);
  }

 private:
  template <class A>
  FL_APART void copy(const Seek& at, int64_t n, const T* source, A* scratch) const {
    for_each_run(at, n, [&](int64_t done, int64_t count, int64_t offset, int64_t stride) {
      const T* from = source + offset;
      A* to = scratch + done;
      if (stride == 0) {
        const A value = widen(*from);
        for (int64_t i = 0; i < count; ++i) to[i] = value;
        return;
      }
      with_stride(stride, [&](auto step) {
        FL_ELEMENTWISE
        for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * step]);
      });
    });
  }

  const T* data_;
  int64_t last_;
};

// Blocks of a tensor for every step of the loops around lanes, which several loops of a pass read in turn:
// where they must be copied, they are once.
template <class A>
class Kept {
 public:
  explicit Kept(int64_t steps)
      : are_few_(steps <= 64), blocks_(are_few_ ? steps * kBlock : 0), at_(are_few_ ? steps : 0) {
    for (int64_t step = 0; are_few_ && step < steps; ++step) at_[step] = {0, -1};
  }

  template <class T>
  const A* block(int64_t step, const View<T>& view, const Seek& at, int64_t n, int64_t base,
                 A* scratch) const {
    return are_few_ ? kept(step, view, at, n, base) : view.block(at, n, base, scratch);
  }

 private:
  struct Place {
    int64_t base, position;
  };

  template <class T>
  FL_APART const A* kept(int64_t step, const View<T>& view, const Seek& at, int64_t n, int64_t base) const {
    A* own = blocks_ + step * kBlock;
    if (at_[step].base == base && at_[step].position == at.position) return own;
    const A* block = view.block(at, n, base, own);
    if (block == own) at_[step] = {base, at.position};
    return block;
  }

  bool are_few_;
  Memory<A> blocks_;
  Memory<Place> at_;  // where each of them starts
};

// Indices along one dimension of a tensor that lie in it are those of [0, size), or multiples of a divisor in
// [0, divisor * size), whose quotients are `stride` apart in memory.
struct Range {
  int64_t base, size, divisor = 1, stride = 0;
};

// Of a run of lanes, every `pace`-th one of [begin, end): they are `stride` apart in memory, the first at
// `offset`.
struct Some {
  int64_t begin, end, pace, offset, stride;
};

// A tensor as lanes read it that they may lie outside of, where they read 0.
template <class T>
class Guarded {
 public:
  // `along` has how fast the index of each dimension that may be left changes along the axes.
  FL_APART Guarded(const T* data, const Lanes& lanes, const Strides& strides,
                   std::initializer_list<Strides> along)
      : data_(data), rank_(static_cast<int>(most(lanes.rank, 1))) {
    for (int k = 0; k < rank_; ++k) {
      extent_[k] = k < lanes.rank ? lanes.extent[k] : 1;
      stride_[k] = k < lanes.rank ? strides.of[lanes.axis[k]] : 0;
      int64_t* step = step_[k];
      for (const Strides& index : along) *step++ = k < lanes.rank ? index.of[lanes.axis[k]] : 0;
    }
  }

  // n lanes from a position on: the memory itself where it can be used as it is, else a copy.
  template <class A>
  FL_APART const A* block(int64_t position, int64_t n, int64_t base, std::initializer_list<Range> ranges,
                          A* scratch) const {
    int64_t at[kMaxRank];
    for (int k = rank_; k-- > 0; position /= extent_[k]) at[k] = position % extent_[k];
    const int last = rank_ - 1;
    bool divides = false;
    for (const Range& range : ranges) divides |= range.divisor != 1;
    for (int64_t done = 0; done < n;) {
      const int64_t count = least(n - done, extent_[last] - at[last]);
      const Some inside = divides ? multiples(at, count, base, ranges) : inside_of(at, count, base, ranges);
      if constexpr (std::is_same_v<T, A>) {
        if (n == whole(n) && inside.begin == 0 && inside.end == n && inside.pace == 1 && inside.stride == 1) {
          return data_ + inside.offset;
        }
      }
      copy(inside, count, scratch + done);
      done += count;
      at[last] = 0;
      for (int k = last; k-- > 0 && ++at[k] == extent_[k];) at[k] = 0;
    }
    return padded(scratch, n);
  }

 private:
  // The lanes of a run whose indices lie between the ends of their ranges.
  Some inside_of(const int64_t* at, int64_t count, int64_t base, std::initializer_list<Range> ranges) const {
    const int last = rank_ - 1;
    Some some{0, count, 1, base, stride_[last]};
    int guard = 0;
    for (const Range& range : ranges) {
      narrow_down(index_at(at, range, guard), step_[last][guard], range.size * range.divisor, some);
      ++guard;
    }
    some.begin = least(some.begin, count), some.end = most(some.begin, some.end);
    for (int k = 0; k < rank_; ++k) some.offset += at[k] * stride_[k];
    some.offset += some.begin * some.stride;
    return some;
  }
  // Those whose indices the divisors divide.
  FL_APART Some multiples(const int64_t* at, int64_t count, int64_t base,
                          std::initializer_list<Range> ranges) const {
    Some some = inside_of(at, count, base, ranges);
    const int last = rank_ - 1;
    int guard = 0;
    for (const Range& range : ranges) {
      sift(index_at(at, range, guard), step_[last][guard], range.divisor, some);
      ++guard;
    }
    guard = 0;
    for (const Range& range : ranges) {
      const int64_t step = step_[last][guard];
      some.offset += (index_at(at, range, guard) + some.begin * step) / range.divisor * range.stride;
      some.stride += some.pace * step / range.divisor * range.stride;
      ++guard;
    }
    return some;
  }
  int64_t index_at(const int64_t* at, const Range& range, int guard) const {
    int64_t index = range.base;
    for (int k = 0; k < rank_; ++k) index += at[k] * step_[k][guard];
    return index;
  }
  // Leaves of some lanes those whose index, which starts at one of the whole run, is in [0, size).
  static void narrow_down(int64_t index, int64_t step, int64_t size, Some& some) {
    if (step == 0) {
      if (index < 0 || index >= size) some.end = some.begin;
      return;
    }
    const int64_t first = step > 0 ? -index : index - size + 1, last = step > 0 ? size - index : index + 1;
    const int64_t pace = abs_(step);
    some.begin = most(some.begin, first > 0 ? ceiling(first, pace) : 0);
    some.end = least(some.end, last > 0 ? ceiling(last, pace) : 0);
  }
  // Leaves those whose index is a multiple of the divisor.
  static void sift(int64_t index, int64_t step, int64_t divisor, Some& some) {
    const int64_t skip = some.stride / some.pace, shared = common_divisor(divisor, some.pace * step);
    if ((index + some.begin * step) % shared != 0) some.end = some.begin;
    while (some.begin < some.end && (index + some.begin * step) % divisor != 0) {
      some.begin += some.pace, some.offset += some.stride;
    }
    some.begin = least(some.begin, some.end);
    some.pace *= divisor / shared, some.stride = skip * some.pace;
  }
  template <class A>
  FL_INLINE void copy(const Some& inside, int64_t count, A* to) const {
    const T* source = data_ + inside.offset;
    const int64_t n = inside.end - inside.begin, stride = inside.stride, pace = inside.pace;
    if (pace != 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = A(0);
      to += inside.begin;
      for (int64_t i = 0; i < n; i += pace, source += stride) to[i] = widen(*source);
      return;
    }
    for (int64_t i = 0; i < inside.begin; ++i) to[i] = A(0);
    to += inside.begin;
    with_stride(stride, [&](auto step) {
      FL_ELEMENTWISE
      for (int64_t i = 0; i < n; ++i) to[i] = widen(source[i * step]);
    });
    for (int64_t i = n; i < count - inside.begin; ++i) to[i] = A(0);
  }

  const T* data_;
  int rank_;
  int64_t extent_[kMaxRank], stride_[kMaxRank], step_[kMaxRank][kMaxRank];
};

// A tensor as lanes write it.
template <class T>
class Output : public Steps {
 public:
  Output(T* data, const Lanes& lanes, const Strides& strides, int64_t numel)
      : Steps(lanes, strides), data_(data), streams_(numel * static_cast<int64_t>(sizeof(T)) >= kStreamed) {}

  // Where lanes are best computed: in their place, or in scratch memory.
  template <class A>
  A* place(const Seek& at, int64_t n, int64_t base, A* scratch) const {
    if constexpr (std::is_same_v<T, A>) {
      if (n == whole(n) && !streams_ && is_adjacent(at, n)) return data_ + base + at.offset;
    }
    return scratch;
  }
  // Moves lanes to their place, if they are not there yet.
  template <class A>
  void put(const Seek& at, int64_t n, int64_t base, const A* values) const {
    T* to = data_ + base + at.offset;
    if constexpr (std::is_same_v<T, A>) {
      if (values == to) return;
    }
    move(at, n, base, values);
  }

 private:
  template <class A>
  FL_APART void move(const Seek& at, int64_t n, int64_t base, const A* values) const {
    if (streams_ && is_adjacent(at, n)) return stream(values, n, data_ + base + at.offset);
    for_each_run(at, n, [&](int64_t done, int64_t count, int64_t offset, int64_t stride) {
      T* run = data_ + base + offset;
      with_stride(stride, [&](auto step) {
        FL_ELEMENTWISE
        for (int64_t i = 0; i < count; ++i) narrow(values[done + i], run[i * step]);
      });
    });
  }
  template <class A>
  static void stream(const A* values, int64_t n, T* to) {
    if constexpr (std::is_same_v<T, A>) {
      stream_bytes(values, n * static_cast<int64_t>(sizeof(T)), to);
    } else {
      alignas(64) T narrowed[kBlock];
      FL_ELEMENTWISE
      for (int64_t i = 0; i < n; ++i) narrow(values[i], narrowed[i]);
      stream(narrowed, n, to);
    }
  }

  T* data_;
  bool streams_;
};

// Elements of a task, of which there are few where each has many results to be joined.
inline int64_t task_size(int64_t results) { return most(kTask, 32 * results); }

// How a kernel is cut into tasks: each has a piece of the other outer axes for one point of the batch, or all
// of them for several points.
struct Parts {
  int64_t batch, rest, width, chunk, pieces, group, tasks;

  Parts(int64_t batch_points, int64_t points, int64_t block, int64_t wanted)
      : batch(batch_points),
        rest(points),
        width(block),
        chunk(most(block, wanted / block * block)),
        pieces(ceiling(points, chunk)),
        group(pieces == 1 ? most(1, chunk / points) : 1),
        tasks(ceiling(batch, group) * pieces) {}

  int64_t begin(int64_t task) const { return task % pieces * chunk; }
  int64_t end(int64_t task) const { return least(rest, (task % pieces + 1) * chunk); }
  int64_t first(int64_t task) const { return task / pieces * group; }
  int64_t last(int64_t task) const { return least(batch, (task / pieces + 1) * group); }
  // Where what a task adds up for a point of the batch stands.
  int64_t slots() const { return batch * most(1, pieces); }
  int64_t slot(int64_t part, int64_t task) const { return part * pieces + task % pieces; }
};

// Columns come in blocks whose inner axes stay in cache.
inline Parts columns(int64_t batch, int64_t lanes, int64_t inner, int64_t results) {
  const int64_t width = most(64, least(kBlock, kTask / most(inner, 1) / 64 * 64));
  return {batch, lanes, width, task_size(results) / most(inner, 1)};
}
inline Parts rows(int64_t batch, int64_t rows, int64_t inner, int64_t results) {
  return {batch, rows, 1, task_size(results) / most(inner, 1)};
}

template <class T>
FL_APART void fill(T* out, int64_t n, std::common_type_t<T> value) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

// Joins the results of tasks in their order; without tasks there is only the start.
template <class How>
FL_APART void join_tasks(typename How::Result* partial, int64_t tasks, int64_t count) {
  if (tasks == 0) fill(partial, count, How::start());
  for (int64_t task = 1; task < tasks; ++task) {
    const typename How::Result* other = partial + task * count;
    for (int64_t i = 0; i < count; ++i) partial[i] = How::join(partial[i], other[i]);
  }
}

// What a reduction accumulated, as what its buffer holds.
template <class A, class Result>
FL_INLINE A result(Result value) {
  return static_cast<A>(value);
}
template <class A, class Value>
FL_INLINE A result(Place<Value> place) {
  return static_cast<A>(place.index);
}

}  // namespace
