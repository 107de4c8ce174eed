// A product of bf16 that is added to a sum in fp32: torch rounds products of bf16 on a CPU.
#include <torch/csrc/stable/library.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <limits>

#include "../common/isa.h"
#include "operand.h"

namespace fused_losses {

// A tile's sums stay in registers, a block of the left matrix in the second-level cache.
constexpr int64_t kTileRows = 8, kTileColumns = 32, kBlock = 64, kMostPairs = 256;

// Where a tile's sums go: as many rows and columns as there are left, at most a tile's.
struct Tile {
  float* data;
  int64_t stride, rows, columns;
  bool is_fresh;
};

using AddTile = void(const uint32_t* left, const uint32_t* right, int64_t pairs, const Tile& out);

struct ProductFunctions {
  void (*pair_up)(const uint16_t* first, const uint16_t* second, int64_t n, int64_t width, uint32_t* pairs);
  AddTile* add_tile;
};

}  // namespace fused_losses

#define FL_KERNELS "../cpu/product_kernels.h"
#include "../common/for_each_isa.h"

namespace fused_losses {
namespace {

#ifdef __x86_64__
__attribute__((target("avx512f,avx512bf16"))) void add_tile_of_pairs(const uint32_t* left,
                                                                     const uint32_t* right, int64_t pairs,
                                                                     const Tile& out) {
  constexpr int64_t lanes = 16, vectors = kTileColumns / lanes;
  __m512 sums[kTileRows][vectors] = {};
  for (int64_t k = 0; k < pairs; ++k, left += kBlock, right += kTileColumns) {
    const auto first = (__m512bh)_mm512_loadu_si512(right),
               second = (__m512bh)_mm512_loadu_si512(right + lanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[i]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], pair, first);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], pair, second);
    }
  }
  const auto mask = static_cast<uint32_t>((uint64_t{1} << out.columns) - 1);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i) {
    if (i == out.rows) return;
#pragma GCC unroll 2
    for (int64_t j = 0; j < vectors; ++j) {
      const auto columns = static_cast<__mmask16>(mask >> j * lanes);
      float* to = out.data + i * out.stride + j * lanes;
      const __m512 before = _mm512_maskz_loadu_ps(out.is_fresh ? 0 : columns, to);
      _mm512_mask_storeu_ps(to, columns, _mm512_add_ps(before, sums[i][j]));
    }
  }
}
#endif

ProductFunctions product_functions() {
  ProductFunctions chosen = choose(isa_default::kProduct, isa_avx2::kProduct, isa_avx512::kProduct);
#ifdef __x86_64__
  if (isa() == Isa::Avx512 && __builtin_cpu_supports("avx512bf16")) chosen.add_tile = add_tile_of_pairs;
#endif
  return chosen;
}

// Rows of bf16, of which any two neighbours are read as pairs.
struct Rows {
  const uint16_t* data;
  int64_t stride, count;

  explicit Rows(const Tensor& matrix)
      : data(static_cast<const uint16_t*>(matrix.const_data_ptr())),
        stride(matrix.strides()[0]),
        count(matrix.sizes()[0]) {}

  int64_t pairs() const { return (count + 1) / 2; }
  Rows part(int64_t first) const {
    Rows rows = *this;
    rows.data += first * stride, rows.count = std::min(2 * kMostPairs, count - first);
    return rows;
  }
  // Pairs of some adjacent columns, filled up to a width; fetches their neighbours, which are asked for next.
  void pair_up(const ProductFunctions& f, int64_t column, int64_t n, int64_t width, uint32_t* out) const {
    const uint16_t* row = data + column;
    for (int64_t k = 0; k < pairs(); ++k, row += 2 * stride, out += width) {
      const uint16_t* next = 2 * k + 1 < count ? row + stride : nullptr;
      f.pair_up(row, next, n, width, out);
      for (int64_t i = width; i < 2 * width; i += 32) {
        __builtin_prefetch(row + i, 0, 2);
        if (next != nullptr) __builtin_prefetch(next + i, 0, 2);
      }
    }
  }
};

// The sum: its memory arrives while a tile is computed.
struct Total {
  float* data;
  int64_t rows, columns;
  bool is_fresh;

  Tile tile(int64_t row, int64_t column) const {
    const Tile tile{data + row * columns + column, columns, std::min(kTileRows, rows - row),
                    std::min(kTileColumns, columns - column), is_fresh};
    for (int64_t i = 0; i < tile.rows; ++i) {
      __builtin_prefetch(tile.data + i * columns, 1);
      __builtin_prefetch(tile.data + i * columns + kTileColumns / 2, 1);
    }
    return tile;
  }
};

void add_product(const ProductFunctions& f, const Total& total, const Rows& left, const Rows& right) {
  const int64_t pairs = right.pairs(), panel = pairs * kTileColumns;
  const int64_t panels = (total.columns + kTileColumns - 1) / kTileColumns;
  std::vector<uint32_t> columns(panels * panel);
  for_each_task(panels, [&](int64_t p) {
    const int64_t first = p * kTileColumns, n = std::min(kTileColumns, total.columns - first);
    right.pair_up(f, first, n, kTileColumns, columns.data() + p * panel);
  });
  for_each_task((total.rows + kBlock - 1) / kBlock, [&](int64_t block) {
    alignas(64) thread_local uint32_t rows[kMostPairs * kBlock];
    const int64_t first = block * kBlock, n = std::min(kBlock, total.rows - first);
    left.pair_up(f, first, n, kBlock, rows);
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t i = 0; i < n; i += kTileRows) {
        f.add_tile(rows + i, columns.data() + p * panel, pairs, total.tile(first + i, p * kTileColumns));
      }
    }
  });
}

// total += left^T right, or = where the total is fresh.
void add_product_in_place(Tensor total, const Tensor& left, const Tensor& right, bool is_fresh) {
  const auto is_matrix = [](const Tensor& x) {
    return x.scalar_type() == ScalarType::BFloat16 && has_adjacent_columns(x);
  };
  STD_TORCH_CHECK(is_matrix(left) && is_matrix(right) && left.sizes()[0] == right.sizes()[0],
                  "left and right must be bfloat16, with as many rows of adjacent columns");
  STD_TORCH_CHECK(total.scalar_type() == ScalarType::Float && total.is_contiguous() &&
                      has_shape(total, {left.sizes()[1], right.sizes()[1]}),
                  "total must be float32, contiguous, and of the shape of left^T right");
  const ProductFunctions f = product_functions();
  Total sums{static_cast<float*>(total.mutable_data_ptr()), total.sizes()[0], total.sizes()[1], is_fresh};
  const Rows rows(left), columns(right);
  if (is_fresh && rows.count == 0) std::memset(sums.data, 0, sizeof(float) * total.numel());
  for (int64_t first = 0; first < rows.count; first += 2 * kMostPairs, sums.is_fresh = false) {
    add_product(f, sums, rows.part(first), columns.part(first));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { m.impl("add_product_", TORCH_BOX(&add_product_in_place)); }

}  // namespace fused_losses
