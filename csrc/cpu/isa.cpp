#include "../common/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstdlib>

namespace fused_losses {
namespace {

Isa supported() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::Avx512 : avx2 ? Isa::Avx2 : Isa::Default;
#else
  return Isa::Default;
#endif
}

Isa decide() {
  const Isa best = supported();
  const char* value = std::getenv("FUSED_LOSSES_CPU_CAPABILITY");
  const std::string wanted = value == nullptr ? "" : value;
  if (wanted.empty() || wanted == "avx512") return best;
  if (wanted == "avx2") return best < Isa::Avx2 ? best : Isa::Avx2;
  if (wanted == "default") return Isa::Default;
  std::fprintf(stderr,
               "fused_losses: FUSED_LOSSES_CPU_CAPABILITY must be default, avx2 or avx512, got %s; "
               "ignored\n",
               value);
  return best;
}

}  // namespace

Isa isa() {
  static const Isa decided = decide();
  return decided;
}

std::string isa_name() { return isa() == Isa::Avx512 ? "avx512" : isa() == Isa::Avx2 ? "avx2" : "default"; }

}  // namespace fused_losses

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fused_losses::isa_name));
}
