// A few threads that wait a moment for work before they sleep. Rows are split the same way for any number of threads and no sum is
// shared between them, so results do not depend on it.
#pragma once

#include <pthread.h>

#include "common.h"

namespace pf {

class Pool {
  public:
    ~Pool() { stop(); }
    bool start(int threads);  // the caller is one of them
    int threads() const { return count_; }

    // f(index) on every thread at once, the caller included; returns when all are done.
    template <typename F> void run(F &&f) {
        run_raw([](void *context, int index) { (*static_cast<F *>(context))(index); }, &f);
    }
    // f(begin, end) over [0, n) in pieces of like size, one a thread.
    template <typename F> void split(int n, F &&f) {
        if (count_ == 1 || n <= 1) {
            if (n > 0) f(0, n, 0);
            return;
        }
        run([&](int index) {
            int begin = int(int64_t(n) * index / count_), end = int(int64_t(n) * (index + 1) / count_);
            if (begin < end) f(begin, end, index);
        });
    }

  private:
    using Work = void (*)(void *, int);
    struct Thread {
        Pool *pool;
        int index;
        pthread_t handle;
    };
    void run_raw(Work work, void *context);
    void stop();
    static void *loop(void *thread);

    int count_ = 1, started_ = 0;
    Thread others_[256];
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER, done_ = PTHREAD_COND_INITIALIZER;
    Work work_ = nullptr;
    void *context_ = nullptr;
    int generation_ = 0;  // counts the calls of run; read without the lock while spinning
    int left_ = 0;        // threads still at work
    bool quit_ = false;
};

} // namespace pf
