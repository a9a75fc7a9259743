// pocketforge-check: every kernel variant that this machine can run against the reference, bit by bit. Prints one JSON object.
#include "check.h"

namespace pf {
namespace check {
namespace {

struct Report {
    long checks = 0, failed = 0;
    char texts[8][128];
} report;

} // namespace

uint32_t random_bits() {
    static uint64_t state = 1;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return uint32_t(state >> 16);
}

void same(const void *found, const void *expected, size_t bytes, const char *format, ...) {
    ++report.checks;
    if (memcmp(found, expected, bytes) == 0) return;
    if (report.failed++ >= 8) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(report.texts[report.failed - 1], sizeof report.texts[0], format, arguments);
    va_end(arguments);
}

} // namespace check
} // namespace pf

namespace {

using namespace pf;
using check::report;

void check_all(bool quick) {
    for (int content = 0; content < check::kContents; ++content) {
        for (int n : {16, 17, 48, 576}) {
            for (int k : {32, 64, 96, 576}) {
                if (quick && n > 48) continue;
                for (int m : {1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 25}) {
                    check::multiply(Matrix::kInt4, n, k, m, content);
                    check::multiply(Matrix::kInt8, n, k, m, content);
                }
            }
        }
    }
    for (int isa = 1; isa < ops_count(); ++isa) {
        const Ops &ops = *ops_at(isa);
        if (!ops.supported()) continue;
        for (int n : {32, 64, 96, 128, 576, 4096}) {
            if (quick && n > 576) continue;
            for (int kind = 0; kind < check::kRowKinds; ++kind) check::floats(ops, n, kind);
        }
        for (int experts : {1, 2, 3, 4, 7, 16, 60}) {
            for (int tokens : {1, 2, 3, 4, 5, 9}) {
                for (int kind : {0, 1, 5, 7}) check::router(ops, tokens, experts, experts == 60 && !quick ? 768 : 96, kind);
            }
        }
        for (size_t bytes : {size_t(0), size_t(64), size_t(1000), size_t(65536)}) check::read(ops, bytes);
        for (int type : {PF_KV_F32, PF_KV_F16, PF_KV_INT8}) {
            for (int d : {32, 64, 96, 128}) {
                KvLayout layout = {d, type};
                check::attention(ops, layout, 8, 2);
                check::attention(ops, layout, 40, 4);
                check::attention(ops, layout, 150, 4);  // around the ring, twice
                if (!quick) check::attention(ops, layout, 1000, 64);
            }
        }
    }
}

// One product, for tools that count instructions: "ISA int4|int8 N K M".
bool check_one(char **arguments) {
    int sizes[3];
    for (int i = 0; i < 3; ++i) sizes[i] = atoi(arguments[2 + i]);
    bool four = strcmp(arguments[1], "int4") == 0;
    if (sizes[0] < 1 || sizes[1] < kGroup || sizes[1] % kGroup != 0 || sizes[2] < 1) return false;
    if (!four && strcmp(arguments[1], "int8") != 0) return false;
    for (int isa = 1; isa < ops_count(); ++isa) {
        const Ops *ops = ops_at(isa);
        if (strcmp(arguments[0], ops->name) != 0 || !ops->supported()) continue;
        check::multiply(four ? Matrix::kInt4 : Matrix::kInt8, sizes[0], sizes[1], sizes[2], 0, ops);
        return true;
    }
    return false;
}

} // namespace

int main(int argc, char **argv) {
    bool quick = argc == 2 && strcmp(argv[1], "--quick") == 0, one = argc == 7 && strcmp(argv[1], "--one") == 0;
    if ((argc > 1 && !quick && !one) || (one && !check_one(argv + 2))) {
        fputs("usage: pocketforge-check [--quick]                            --quick: fewer shapes, for an emulated CPU\n"
              "       pocketforge-check --one VARIANT int4|int8 N K M       one product of one variant that runs here\n",
              stderr);
        return 2;
    }
    if (!one) check_all(quick);
    printf("{\"isa\":[");
    for (int isa = 0, printed = 0; isa < ops_count(); ++isa) {
        if (ops_at(isa)->supported()) printf("%s\"%s\"", printed++ == 0 ? "" : ",", ops_at(isa)->name);
    }
    printf("],\"checks\":%ld,\"failed\":%ld,\"failures\":[", report.checks, report.failed);
    for (long i = 0; i < smaller<long>(report.failed, 8); ++i) printf("%s\"%s\"", i == 0 ? "" : ",", report.texts[i]);
    printf("]}\n");
    return report.failed == 0 ? 0 : 1;
}
