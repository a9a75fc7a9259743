#include "threads.h"

#include <time.h>

namespace pf {

namespace {

int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True as soon as `ready()`; false after about 20 microseconds: whoever else needs the core gets it then.
template <typename F> bool spin(F ready) {
    int64_t end = nanoseconds() + 20000;
    do {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return true;
            relax();
        }
    } while (nanoseconds() < end);
    return ready();
}

} // namespace

bool Pool::start(int threads) {
    stop();
    count_ = threads;
    for (int i = 1; i < threads; ++i) {
        others_[i] = {this, i, {}};
        if (pthread_create(&others_[i].handle, nullptr, loop, &others_[i]) != 0) {
            stop();
            return false;
        }
        started_ = i;
    }
    return true;
}

void Pool::stop() {
    pthread_mutex_lock(&mutex_);
    quit_ = true;
    pthread_cond_broadcast(&wake_);
    pthread_mutex_unlock(&mutex_);
    for (int i = 1; i <= started_; ++i) pthread_join(others_[i].handle, nullptr);
    quit_ = false;
    started_ = 0;
    count_ = 1;
}

void Pool::run_raw(Work work, void *context) {
    if (count_ == 1) {
        work(context, 0);
        return;
    }
    pthread_mutex_lock(&mutex_);
    work_ = work;
    context_ = context;
    __atomic_store_n(&left_, count_ - 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&generation_, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&wake_);
    pthread_mutex_unlock(&mutex_);
    work(context, 0);
    auto all_done = [this] { return __atomic_load_n(&left_, __ATOMIC_ACQUIRE) == 0; };
    if (spin(all_done)) return;
    pthread_mutex_lock(&mutex_);
    while (!all_done()) pthread_cond_wait(&done_, &mutex_);
    pthread_mutex_unlock(&mutex_);
}

void *Pool::loop(void *argument) {
    Thread *thread = static_cast<Thread *>(argument);
    Pool *pool = thread->pool;
    int seen = 0;
    for (;;) {
        spin([&] { return __atomic_load_n(&pool->generation_, __ATOMIC_ACQUIRE) != seen; });
        pthread_mutex_lock(&pool->mutex_);
        while (pool->generation_ == seen && !pool->quit_) pthread_cond_wait(&pool->wake_, &pool->mutex_);
        if (pool->quit_) {
            pthread_mutex_unlock(&pool->mutex_);
            return nullptr;
        }
        seen = pool->generation_;
        Work work = pool->work_;
        void *context = pool->context_;
        pthread_mutex_unlock(&pool->mutex_);
        work(context, thread->index);
        if (__atomic_sub_fetch(&pool->left_, 1, __ATOMIC_ACQ_REL) == 0) {
            pthread_mutex_lock(&pool->mutex_);
            pthread_cond_signal(&pool->done_);
            pthread_mutex_unlock(&pool->mutex_);
        }
    }
}

} // namespace pf
