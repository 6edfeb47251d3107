// A small persistent pool: its threads spin for some microseconds after a job, then sleep.
#include "kernels.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace tandem {
namespace {

constexpr int kSpins = 20000;  // about 100 microseconds: longer than the gaps inside a step

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// A process that was given as many cores as it has threads keeps each thread on one of them.
void pin(int64_t thread, int64_t threads) {
#if defined(__linux__)
    cpu_set_t given, one;
    if (sched_getaffinity(0, sizeof given, &given) != 0 || CPU_COUNT(&given) != threads) return;
    for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &given) || seen++ != thread) continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    }
#else
    (void)thread, (void)threads;
#endif
}

struct Job {
    void (*body)(void *, int64_t);
    void *context;
    int64_t tasks;
};

class Pool {
public:
    explicit Pool(int64_t threads) {
        for (int64_t i = 1; i < threads; i++)
            helpers_.emplace_back([this, i, threads] {
                pin(i, threads);
                serve();
            });
    }

    ~Pool() {
        stopping_ = true;
        announce();
        for (auto &helper : helpers_) helper.join();
    }

    int64_t threads() const { return static_cast<int64_t>(helpers_.size()) + 1; }

    // Waits for the tasks, not for the helpers: one whose core was taken away holds up nothing but
    // the task it may be in.
    void run(Job job) {
        job_ = job;
        undone_.store(job.tasks, std::memory_order_relaxed);
        unclaimed_.store(job.tasks, std::memory_order_release);
        announce();
        take_tasks();
        for (int spins = 0; undone_.load(std::memory_order_acquire) != 0; spins++)
            if (spins < kSpins) relax(); else std::this_thread::yield();
    }

private:
    void announce() {
        generation_.fetch_add(1);
        if (asleep_.load() == 0) return;
        std::lock_guard<std::mutex> hold(mutex_);
        wake_.notify_all();
    }

    // A claim is what makes the job safe to look at: it stays until the claimed task is done.
    void take_tasks() {
        int64_t left = unclaimed_.load(std::memory_order_acquire);
        while (left > 0) {
            if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
            job_.body(job_.context, job_.tasks - left);
            undone_.fetch_sub(1, std::memory_order_release);
            left = unclaimed_.load(std::memory_order_acquire);
        }
    }

    void serve() {
        for (int64_t seen = 0;;) {
            seen = wait_for_news(seen);
            if (stopping_) return;
            take_tasks();
        }
    }

    int64_t wait_for_news(int64_t seen) {
        for (int spins = 0; spins < kSpins; spins++, relax())
            if (generation_.load(std::memory_order_acquire) != seen) return seen + 1;
        std::unique_lock<std::mutex> hold(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(hold, [&] { return generation_.load() != seen; });
        asleep_.fetch_sub(1);
        return seen + 1;
    }

    std::vector<std::thread> helpers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<int64_t> asleep_{0};
    Job job_{};
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<int64_t> generation_{0};
    alignas(64) std::atomic<int64_t> unclaimed_{0};
    alignas(64) std::atomic<int64_t> undone_{0};
};

std::mutex pool_mutex;
std::unique_ptr<Pool> pool;

struct Buffer {
    void *data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
};

}  // namespace

void set_threads(int64_t threads) {
    std::lock_guard<std::mutex> hold(pool_mutex);
    if (pool && pool->threads() == threads) return;
    pool.reset();
    if (threads > 1) pool = std::make_unique<Pool>(threads);
}

int64_t threads() {
    return pool ? pool->threads() : 1;
}

void run_tasks(int64_t tasks, void (*body)(void *, int64_t), void *context) {
    std::unique_lock<std::mutex> hold(pool_mutex, std::defer_lock);
    if (tasks > 1 && pool) {
        hold.lock();
        pool->run({body, context, tasks});
        return;
    }
    for (int64_t task = 0; task < tasks; task++) body(context, task);
}

void *scratch(ScratchSlot slot, size_t bytes) {
    thread_local Buffer buffers[kScratchSlots];
    constexpr int64_t small_page = 4096, huge_page = 2 << 20;
    Buffer &buffer = buffers[slot];
    if (buffer.bytes >= bytes) return buffer.data;
    std::free(buffer.data);
    int64_t page = bytes > huge_page / 4 ? huge_page : small_page;
    buffer.bytes = static_cast<size_t>(round_up(static_cast<int64_t>(bytes), page));
    buffer.data = std::aligned_alloc(page, buffer.bytes);
    if (buffer.data == nullptr) throw std::bad_alloc();
    use_huge_pages(buffer.data, static_cast<int64_t>(buffer.bytes));
    return buffer.data;
}

}  // namespace tandem
