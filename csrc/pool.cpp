// See pool.h. One region at a time: the caller opens it, works along, closes it, and waits until no worker is inside.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nemotron_h {
namespace {

constexpr auto spin_time = std::chrono::microseconds(200);  // longer than Python needs between two ops
constexpr int pauses_per_look = 32;

void pause() noexcept {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

struct alignas(64) Range {
    std::atomic<size_t> next{0};
    size_t end = 0;
};

class Pool {
  public:
    explicit Pool(size_t count) : ranges_(count), count_(count) {
        try {
            for (size_t i = 1; i < count; ++i) std::thread(&Pool::work, this, i).detach();
        } catch (...) {  // no more threads to be had: those that run take all the blocks
        }
    }

    size_t count() const { return count_; }

    void run(size_t count, size_t grain, Block* block, void* context) noexcept {
        block_ = block, context_ = context, grain_ = grain;
        const size_t blocks = (count + grain - 1) / grain;
        for (size_t i = 0, first = 0; i < count_; ++i) {
            const size_t last = blocks * (i + 1) / count_;
            ranges_[i].next.store(first * grain, std::memory_order_relaxed);
            ranges_[i].end = last * grain < count ? last * grain : count;
            first = last;
        }
        open_.store(true);  // sequentially consistent, as every access to open_, inside_, epoch_ and sleepers_
        epoch_.fetch_add(1);
        if (sleepers_.load() > 0) wake();
        take(0);
        open_.store(false);
        for (int looks = 0; inside_.load() != 0; ++looks) {
            if (looks < 1000) pause();
            else std::this_thread::yield();  // more threads than cores: let the one inside finish its block
        }
    }

  private:
    // Blocks of the own range, then of the others'.
    void take(size_t own) noexcept {
        for (size_t i = 0; i < count_; ++i) {
            Range& range = ranges_[(own + i) % count_];
            for (;;) {
                const size_t begin = range.next.fetch_add(grain_, std::memory_order_relaxed);
                if (begin >= range.end) break;
                block_(context_, begin, begin + grain_ < range.end ? begin + grain_ : range.end);
            }
        }
    }

    void work(size_t own) noexcept {
        const FlushSubnormals flush;
        for (unsigned seen = 0;;) {
            seen = wait(seen);
            // In before looking: whoever closes the region waits for all who are in, so what `take` reads stays put.
            inside_.fetch_add(1);
            if (open_.load()) take(own);
            inside_.fetch_sub(1);
        }
    }

    // Returns the number of a region that is not `seen`.
    unsigned wait(unsigned seen) noexcept {
        const auto until = std::chrono::steady_clock::now() + spin_time;
        do {
            for (int i = 0; i < pauses_per_look; ++i) {
                const unsigned epoch = epoch_.load();
                if (epoch != seen) return epoch;
                pause();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        unsigned epoch;
        while ((epoch = epoch_.load()) == seen) wakened_.wait(lock);
        sleepers_.fetch_sub(1);
        return epoch;
    }

    void wake() noexcept {
        { const std::lock_guard<std::mutex> lock(mutex_); }  // whoever is about to sleep has looked or is asleep now
        wakened_.notify_all();
    }

    std::vector<Range> ranges_;
    const size_t count_;
    Block* block_ = nullptr;
    void* context_ = nullptr;
    size_t grain_ = 1;
    alignas(64) std::atomic<unsigned> epoch_{0};
    std::atomic<bool> open_{false};
    alignas(64) std::atomic<int> inside_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wakened_;
};

std::atomic<size_t> wanted{1};
std::atomic<bool> busy{false};

// One pool per number of threads that was asked for; they are few, and those not in use sleep. Never destroyed: a thread
// may sleep in its pool until the process ends.
using Pools = std::map<size_t, Pool*>;
Pools* pools = nullptr;

// A forked child has the memory of the pools without their threads: it starts its own.
void forget_after_fork() noexcept {
    pools = nullptr;
    busy.store(false);
}

Pool* pool_of(size_t count) noexcept {
    try {
        if (pools == nullptr) {
#if defined(__unix__) || defined(__APPLE__)
            static const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
            (void)registered;
#endif
            pools = new Pools;
        }
        Pool*& pool = (*pools)[count];
        if (pool == nullptr) pool = new Pool(count);
        return pool;
    } catch (...) {
        return nullptr;
    }
}

}  // namespace

void set_threads(size_t count) noexcept { wanted.store(count < 1 ? 1 : count); }
size_t threads() noexcept { return wanted.load(); }

void run_parallel(size_t count, size_t grain, Block* block, void* context) noexcept {
    const FlushSubnormals flush;
    if (count == 0) return;
    if (count <= grain || wanted.load() == 1 || busy.exchange(true)) return block(context, 0, count);
    if (Pool* pool = pool_of(wanted.load())) pool->run(count, grain, block, context);
    else block(context, 0, count);  // no memory for a pool
    busy.store(false);
}

#if defined(__x86_64__)
constexpr unsigned flush_to_zero = 0x8000, denormals_are_zero = 0x0040;
FlushSubnormals::FlushSubnormals() noexcept : before_(_mm_getcsr()) {
    _mm_setcsr(static_cast<unsigned>(before_) | flush_to_zero | denormals_are_zero);
}
FlushSubnormals::~FlushSubnormals() noexcept { _mm_setcsr(static_cast<unsigned>(before_)); }
#elif defined(__aarch64__)
FlushSubnormals::FlushSubnormals() noexcept {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(before_ | (1ul << 24)));
}
FlushSubnormals::~FlushSubnormals() noexcept { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }
#else
FlushSubnormals::FlushSubnormals() noexcept : before_(0) {}
FlushSubnormals::~FlushSubnormals() noexcept {}
#endif

}  // namespace nemotron_h
