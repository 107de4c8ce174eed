// The bits of bfloat16 and half as float, and back. Included like numerics.h, after it.

FL_INLINE float from_bfloat16(uint16_t value) { return bits<float>(static_cast<uint32_t>(value) << 16); }

// Rounds to nearest even; a NaN keeps being one.
FL_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t u = bits<uint32_t>(value);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// Exponents are rebased by a multiplication, which also normalises denormals; 31 means inf or NaN.
FL_INLINE float from_half(uint16_t value) {
  const uint32_t magnitude = static_cast<uint32_t>(value & 0x7fffu) << 13;
  const float rebased = bits<float>(magnitude) * 0x1p112f;
  const uint32_t special = bits<uint32_t>(rebased) | 0x7f800000u;
  const uint32_t u = (value & 0x7c00u) == 0x7c00u ? special : bits<uint32_t>(rebased);
  return bits<float>(u | (static_cast<uint32_t>(value & 0x8000u) << 16));
}

FL_INLINE uint16_t to_half(float value) {
  const uint32_t u = bits<uint32_t>(value), magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14, adding 1/2 lets the hardware round to a multiple of 2^-24.
  const uint32_t denormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? denormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(result | ((u >> 16) & 0x8000u));
}
