// The package's own thread pool: blocks of work handed out to threads that spin briefly between regions, then sleep.
//
// A decode step is some hundred regions of 10 to 1000 µs, one after the other, so a region must start in well under a
// microsecond: workers watch one word for a while (spin) before they sleep. A region's items are cut into one contiguous
// range per thread, because memory is fastest read in order, and each range is handed out in small blocks: whoever has
// finished his own range takes blocks of another's, so a thread that the system holds up delays one block, not a share.
//
// Which thread runs a block must never show in the result: a block writes its own outputs and sums nothing across.
#pragma once

#include <cstddef>

namespace nemotron_h {

using Block = void(void* context, size_t begin, size_t end) noexcept;

// Run items [0, count) in blocks of `grain` on the calling thread and the workers, and return when all are done. Called
// while another thread is inside a region, or with a single block, it runs everything on the calling thread.
void run_parallel(size_t count, size_t grain, Block* block, void* context) noexcept;

// These weights are about to be read, by a region to come. A model reads its weights in the same order for every token, so
// the pool remembers what followed them the last time, and workers that wait for the region after this one fetch the
// beginning of their share of it into their caches: memory goes on working while Python gets from one op to the next.
// A wrong guess costs some bandwidth; the address need not be valid any more, since a prefetch never faults.
void about_to_read(const void* weights, size_t bytes) noexcept;

// Threads of a region, the caller among them; starts no thread before the first region. At least 1.
void set_threads(size_t count) noexcept;
size_t threads() noexcept;

// `body(begin, end)` over blocks of [0, count). A template of a lambda is never shared between levels.
template <typename Body>
void parallel(size_t count, size_t grain, const Body& body) noexcept {
    auto block = [](void* context, size_t begin, size_t end) noexcept {
        (*static_cast<const Body*>(context))(begin, end);
    };
    run_parallel(count, grain, block, const_cast<void*>(static_cast<const void*>(&body)));
}

// While it lives, subnormal results and inputs count as zero on this thread, as the matrix units have it: without it the
// levels would differ in bits, and one subnormal scale can make a product twice as slow. Workers live like this.
class FlushSubnormals {
  public:
    FlushSubnormals() noexcept;
    ~FlushSubnormals() noexcept;
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  private:
    unsigned long before_;
};

// The opposite, for kernels whose sums must not depend on where they run.
class KeepSubnormals {
  public:
    KeepSubnormals() noexcept;
    ~KeepSubnormals() noexcept;
    KeepSubnormals(const KeepSubnormals&) = delete;
    KeepSubnormals& operator=(const KeepSubnormals&) = delete;

  private:
    unsigned long before_;
};

}  // namespace nemotron_h
