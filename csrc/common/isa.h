// Which instruction set the CPU kernels use: the best this processor has, or less if asked for.
#pragma once
#include <string>

namespace fused_losses {

enum class Isa { Default, Avx2, Avx512 };

// Decided once, at load. FUSED_LOSSES_CPU_CAPABILITY=default|avx2|avx512 only lowers it.
Isa isa();
std::string isa_name();

// The version of a kernel table for the chosen instruction set.
template <class Table>
const Table& choose(const Table& plain, const Table& avx2, const Table& avx512) {
  return isa() == Isa::Avx512 ? avx512 : isa() == Isa::Avx2 ? avx2 : plain;
}

}  // namespace fused_losses
