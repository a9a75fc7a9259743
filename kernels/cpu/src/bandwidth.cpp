// How fast this process can read memory: the limit that decoding is measured against.
#include <time.h>

#include "threads.h"

#include "ops.h"

extern "C" double pf_read_bandwidth(size_t bytes, int32_t threads, int32_t repeats) {
    const pf::Ops *ops = pf::default_ops();
    pf::Buffer<uint8_t> memory;
    pf::Pool pool;
    bytes = pf::round_up(bytes, 4096);
    if (ops == nullptr || threads < 1 || threads > 256 || !memory.allocate(bytes) || !pool.start(threads)) return 0.0;
    double best = 0.0;
    uint64_t sums[256] = {};
    for (int32_t i = 0; i < repeats; ++i) {
        timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        pool.split(int(bytes / 4096), [&](int first, int last, int thread) {
            sums[thread] += ops->read(memory.data() + size_t(first) * 4096, size_t(last - first) * 4096);
        });
        clock_gettime(CLOCK_MONOTONIC, &end);
        double seconds = double(end.tv_sec - begin.tv_sec) + 1e-9 * double(end.tv_nsec - begin.tv_nsec);
        best = pf::larger(best, double(bytes) / seconds);
    }
    // The sums must be seen, or the reads might be left out.
    volatile uint64_t seen = sums[0];
    return seen == 1 ? 0.0 : best;
}
