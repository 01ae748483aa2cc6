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

// What was read after what: one entry per hash of the address, written over by whatever comes there.
struct Link {
    std::atomic<const char*> from{nullptr}, to{nullptr};
    std::atomic<size_t> bytes{0};
};
constexpr size_t links = 4096;  // a model has some hundreds of matrices
Link link[links];
std::atomic<const char*> last_read{nullptr};

// The guess that waiting workers act on; `number` tells a new one from the old.
struct Guess {
    std::atomic<const char*> begin{nullptr};
    std::atomic<size_t> bytes{0};
    std::atomic<unsigned> number{0};
};
Guess guess;
constexpr size_t most_fetched = 640 << 10;  // of one worker's share: within every second-level cache of 1 MB or more
constexpr size_t line = 64, lines_per_look = 8;

Link& link_from(const char* weights) noexcept { return link[reinterpret_cast<uintptr_t>(weights) / 64 * 0x9e3779b1u % links]; }

// How far one worker has come with the present guess.
class Fetching {
  public:
    Fetching(size_t own, size_t count) : own_(own), count_(count) {}

    // Fetch a few lines; false when there is nothing left to fetch.
    bool some() noexcept {
        const unsigned number = guess.number.load(std::memory_order_acquire);
        if (number != number_) {
            number_ = number;
            const size_t bytes = guess.bytes.load(std::memory_order_relaxed);
            const char* begin = guess.begin.load(std::memory_order_relaxed);
            next_ = begin + bytes * own_ / count_ / line * line;
            const size_t share = bytes / count_;
            left_ = (share < most_fetched ? share : most_fetched) / line;
        }
        for (size_t i = 0; i < lines_per_look && left_ != 0; ++i, --left_, next_ += line) __builtin_prefetch(next_, 0, 2);
        return left_ != 0;
    }

  private:
    const size_t own_, count_;
    unsigned number_ = 0;
    const char* next_ = nullptr;
    size_t left_ = 0;
};

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
        Fetching fetching(own, count_);
        for (unsigned seen = 0;;) {
            seen = wait(seen, fetching);
            // In before looking: whoever closes the region waits for all who are in, so what `take` reads stays put.
            inside_.fetch_add(1);
            if (open_.load()) take(own);
            inside_.fetch_sub(1);
        }
    }

    // Returns the number of a region that is not `seen`.
    unsigned wait(unsigned seen, Fetching& fetching) noexcept {
        const auto until = std::chrono::steady_clock::now() + spin_time;
        do {
            for (int i = 0; i < pauses_per_look; ++i) {
                const unsigned epoch = epoch_.load();
                if (epoch != seen) return epoch;
                if (!fetching.some()) pause();
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

void about_to_read(const void* weights, size_t bytes) noexcept {
    const char* now = static_cast<const char*>(weights);
    const char* before = last_read.exchange(now, std::memory_order_relaxed);
    Link& reached = link_from(before);
    reached.from.store(before, std::memory_order_relaxed);
    reached.to.store(now, std::memory_order_relaxed);
    reached.bytes.store(bytes, std::memory_order_relaxed);
    const Link& following = link_from(now);
    const bool known = following.from.load(std::memory_order_relaxed) == now;
    guess.begin.store(following.to.load(std::memory_order_relaxed), std::memory_order_relaxed);
    guess.bytes.store(known ? following.bytes.load(std::memory_order_relaxed) : 0, std::memory_order_relaxed);
    guess.number.fetch_add(1, std::memory_order_release);
}

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

namespace {

// The register that says how a thread treats subnormal numbers, and its bits that make them zero.
#if defined(__x86_64__)
constexpr unsigned long flushing = 0x8000 | 0x0040;  // flush to zero, denormals are zero
unsigned long float_mode() noexcept { return _mm_getcsr(); }
void set_float_mode(unsigned long mode) noexcept { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
constexpr unsigned long flushing = 1ul << 24;
unsigned long float_mode() noexcept {
    unsigned long mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
void set_float_mode(unsigned long mode) noexcept { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
constexpr unsigned long flushing = 0;
unsigned long float_mode() noexcept { return 0; }
void set_float_mode(unsigned long) noexcept {}
#endif

}  // namespace

FlushSubnormals::FlushSubnormals() noexcept : before_(float_mode()) { set_float_mode(before_ | flushing); }
FlushSubnormals::~FlushSubnormals() noexcept { set_float_mode(before_); }
KeepSubnormals::KeepSubnormals() noexcept : before_(float_mode()) { set_float_mode(before_ & ~flushing); }
KeepSubnormals::~KeepSubnormals() noexcept { set_float_mode(before_); }

}  // namespace nemotron_h
