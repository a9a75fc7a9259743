// Which kernels run: the fastest this machine has, or the one that POCKETFORGE_ISA names.
#include "ops.h"

namespace pf {

namespace {
// From the slowest to the fastest.
const Ops *const kAll[] = {
    &kRefOps,
#if defined(__x86_64__)
    &kAvx2Ops,
    &kAvx512Ops,
#elif defined(__aarch64__)
    &kNeonDotOps,
    &kNeonI8mmOps,
#endif
};
} // namespace

int ops_count() { return int(sizeof(kAll) / sizeof(kAll[0])); }

const Ops *ops_at(int index) { return index >= 0 && index < ops_count() ? kAll[index] : nullptr; }

const Ops *default_ops() {
    const char *wanted = getenv("POCKETFORGE_ISA");
    for (int i = ops_count() - 1; i >= 0; --i) {
        if (!kAll[i]->supported()) continue;
        if (wanted == nullptr || *wanted == '\0' || strcmp(wanted, kAll[i]->name) == 0) return kAll[i];
    }
    return nullptr;
}

} // namespace pf
