// CRC-32C (Castagnoli), the checksum of packed files: one instruction for 8 bytes where the CPU has it.
#include "common.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace pf {
namespace {

uint32_t by_table(const uint8_t *p, size_t size, uint32_t crc) {
    static const auto table = [] {
        struct { uint32_t entry[256]; } t;
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t c = i;
            for (int k = 0; k < 8; ++k) c = c & 1 ? 0x82f63b78u ^ (c >> 1) : c >> 1;
            t.entry[i] = c;
        }
        return t;
    }();
    for (; size > 0; --size, ++p) crc = table.entry[(crc ^ *p) & 255] ^ (crc >> 8);
    return crc;
}

#if defined(__x86_64__)
bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }

__attribute__((target("sse4.2"))) uint32_t by_instruction(const uint8_t *p, size_t size, uint32_t crc) {
    uint64_t wide = crc;
    for (; size >= 8; size -= 8, p += 8) {
        uint64_t eight;
        memcpy(&eight, p, 8);
        wide = _mm_crc32_u64(wide, eight);
    }
    crc = uint32_t(wide);
    for (; size > 0; --size, ++p) crc = _mm_crc32_u8(crc, *p);
    return crc;
}
#elif defined(__aarch64__)
bool has_instruction() { return (getauxval(AT_HWCAP) >> 7 & 1) != 0; }

__attribute__((target("arch=armv8-a+crc"))) uint32_t by_instruction(const uint8_t *p, size_t size, uint32_t crc) {
    for (; size >= 8; size -= 8, p += 8) {
        uint64_t eight;
        memcpy(&eight, p, 8);
        crc = __builtin_aarch64_crc32cx(crc, eight);
    }
    for (; size > 0; --size, ++p) crc = __builtin_aarch64_crc32cb(crc, *p);
    return crc;
}
#else
bool has_instruction() { return false; }
uint32_t by_instruction(const uint8_t *p, size_t size, uint32_t crc) { return by_table(p, size, crc); }
#endif

} // namespace
} // namespace pf

extern "C" uint32_t pf_crc32c(const void *data, size_t size, uint32_t seed) {
    const uint8_t *p = static_cast<const uint8_t *>(data);
    return ~(pf::has_instruction() ? pf::by_instruction(p, size, ~seed) : pf::by_table(p, size, ~seed));
}
