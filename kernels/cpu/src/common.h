// Small tools without the standard library: the runtime links to libc and pthreads only.
#pragma once

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "pocketforge.h"

namespace pf {

constexpr int kPanel = 16;       // output rows that are stored, and computed, together
constexpr int kGroup = 32;       // weights of a row that share a scale
constexpr size_t kAlignment = 64;

inline size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <typename T> inline T smaller(T a, T b) { return a < b ? a : b; }
template <typename T> inline T larger(T a, T b) { return a > b ? a : b; }

// A buffer of 64-byte aligned, zeroed memory. `allocate` says whether there was enough.
template <typename T> class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { free(data_); }

    // With `large_pages` the system is asked for pages of 2 MiB, where it has them: memory that is read in leaps is
    // otherwise read at the pace of address translation.
    bool allocate(size_t count, bool large_pages = false) {
        free(data_);
        data_ = nullptr;
        size_ = 0;
        if (count > SIZE_MAX / 2 / sizeof(T)) return false;
        size_t alignment = large_pages && count * sizeof(T) >= kLargePage ? kLargePage : kAlignment;
        size_t bytes = round_up(larger<size_t>(count * sizeof(T), 1), alignment);
        data_ = static_cast<T *>(aligned_alloc(alignment, bytes));
        if (data_ == nullptr) return false;
#if defined(MADV_HUGEPAGE)
        if (alignment == kLargePage) madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: nothing depends on the answer
#endif
        memset(static_cast<void *>(data_), 0, bytes);
        size_ = count;
        return true;
    }
    T *data() { return data_; }
    const T *data() const { return data_; }
    size_t size() const { return size_; }
    T &operator[](size_t index) { return data_[index]; }
    const T &operator[](size_t index) const { return data_[index]; }

  private:
    static constexpr size_t kLargePage = size_t(2) << 20;
    T *data_ = nullptr;
    size_t size_ = 0;
};

// Where a function that fails says why: one line for the caller.
class Error {
  public:
    Error(char *text, size_t size) : text_(text), size_(size) {
        if (size_ > 0 && text_ != nullptr) text_[0] = '\0';
    }
    __attribute__((format(printf, 3, 4))) pf_status set(pf_status status, const char *format, ...) const {
        if (size_ > 0 && text_ != nullptr) {
            va_list arguments;
            va_start(arguments, format);
            vsnprintf(text_, size_, format, arguments);
            va_end(arguments);
        }
        return status;
    }

  private:
    char *text_;
    size_t size_;
};

inline double seconds_of(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// What `now` reads: a clock that only goes forward, or the process's own (pf_measure_cpu_time).
extern clockid_t measuring_clock;
inline double now() { return seconds_of(measuring_clock); }

inline float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 1023u, bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else { // a subnormal, or zero: mantissa * 2^-24, exact in fp32
        float value = float(mantissa) * (1.0f / 16777216.0f);
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

} // namespace pf

// Construction in place, without <new>.
inline void *operator new(size_t, void *place) noexcept { return place; }
