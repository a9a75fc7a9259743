// The machine's limits, measured in this process: how fast memory is read (decoding), how fast bytes are multiplied (prefill).
#include "threads.h"

#include "ops.h"

clockid_t pf::measuring_clock = CLOCK_MONOTONIC;

extern "C" void pf_measure_cpu_time(int32_t enable) { pf::measuring_clock = enable != 0 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC; }

extern "C" double pf_int8_peak(int32_t repeats) {
    const pf::Ops *ops = pf::default_ops();
    if (ops == nullptr || ops->burn == nullptr) return 0.0;
    double best = 0.0;
    for (int32_t i = 0; i < repeats; ++i) {
        double begin = pf::now();
        int64_t multiplies = ops->burn(2000000);
        best = pf::larger(best, 2.0 * double(multiplies) / (pf::now() - begin));
    }
    return best;
}

extern "C" double pf_read_bandwidth(size_t bytes, int32_t threads, int32_t repeats) {
    const pf::Ops *ops = pf::default_ops();
    pf::Buffer<uint8_t> memory;
    pf::Pool pool;
    bytes = pf::round_up(bytes, 4096);
    if (ops == nullptr || threads < 1 || threads > 256 || !memory.allocate(bytes) || !pool.start(threads)) return 0.0;
    double best = 0.0;
    uint64_t sums[256] = {};
    for (int32_t i = 0; i < repeats; ++i) {
        double begin = pf::now();
        pool.split(int(bytes / 4096), [&](int first, int last, int thread) {
            sums[thread] += ops->read(memory.data() + size_t(first) * 4096, size_t(last - first) * 4096);
        });
        best = pf::larger(best, double(bytes) / (pf::now() - begin));
    }
    // The sums must be seen, or the reads might be left out.
    volatile uint64_t seen = sums[0];
    return seen == 1 ? 0.0 : best;
}
