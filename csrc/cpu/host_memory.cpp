#include "../common/host_memory.h"

#include <torch/csrc/stable/library.h>

namespace fused_losses {
namespace {

void empty_cache() { KeptMemory::instance().clear(); }

}  // namespace
}  // namespace fused_losses

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) { m.def("empty_cache() -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&fused_losses::empty_cache));
}
