// Blocks of a product of bf16 that is added up in fp32, compiled once per instruction set.

#include "../common/numerics.h"

namespace {

// Two rows side by side, as processors multiply them; zeros instead of a row that is not there, and after n.
void pair_up(const uint16_t* first, const uint16_t* second, int64_t n, int64_t width, uint32_t* pairs) {
  if (second == nullptr) {
    FL_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) pairs[i] = first[i];
  } else {
    FL_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) pairs[i] = first[i] | static_cast<uint32_t>(second[i]) << 16;
  }
  for (int64_t i = n; i < width; ++i) pairs[i] = 0;
}

// What processors without an instruction for pairs do.
void add_tile(const uint32_t* left, const uint32_t* right, int64_t pairs, const Tile& out) {
  float sums[kTileRows][kTileColumns] = {};
  for (int64_t k = 0; k < pairs; ++k, left += kBlock, right += kTileColumns) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const float first = bits<float>(left[i] << 16), second = bits<float>(left[i] & 0xffff0000u);
      FL_ELEMENTWISE
      for (int64_t j = 0; j < kTileColumns; ++j) {
        sums[i][j] = fma_(second, bits<float>(right[j] & 0xffff0000u), sums[i][j]);
        sums[i][j] = fma_(first, bits<float>(right[j] << 16), sums[i][j]);
      }
    }
  }
  for (int64_t i = 0; i < out.rows; ++i) {
    float* to = out.data + i * out.stride;
    FL_ELEMENTWISE
    for (int64_t j = 0; j < out.columns; ++j) to[j] = out.is_fresh ? sums[i][j] : to[j] + sums[i][j];
  }
}

constexpr ProductFunctions kProduct = {pair_up, add_tile};

}  // namespace
