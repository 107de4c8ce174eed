// Includes FL_KERNELS once per instruction set, each time in a namespace of its own. No include guard.
// Every header that the kernels need must have been included before: an inline function of the standard
// library compiled here for AVX-512 could be the one the linker keeps for everybody.

namespace fused_losses {

namespace isa_default {
#include FL_KERNELS
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FL_TARGET_HAS_FMA 1  // a target in a pragma defines no __FMA__

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace isa_avx2 {
#include FL_KERNELS
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace isa_avx512 {
#include FL_KERNELS
}
#pragma GCC pop_options
#undef FL_TARGET_HAS_FMA

#else
namespace isa_avx2 = isa_default;
namespace isa_avx512 = isa_default;
#endif

}  // namespace fused_losses
