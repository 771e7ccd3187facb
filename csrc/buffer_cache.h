// Memory for large results: what a freed result leaves is kept for the next one.
//
// Fresh memory costs a page fault and the clearing of every page, together as much time as the kernel that fills it. Memory
// that is kept is marked MADV_FREE: where memory runs short the system takes it back, else the next result finds it mapped.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace e3 {

class BufferCache {
 public:
  struct Buffer {
    void* data;
    int64_t bytes;
  };

  // At least `bytes` bytes, aligned to a huge page; data is null where the system has none.
  Buffer take(int64_t bytes) {
    {
      const std::lock_guard guard(mutex_);
      auto best = kept_.end();
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        const bool fits = it->bytes >= bytes && it->bytes / 2 <= bytes;
        if (fits && (best == kept_.end() || it->bytes < best->bytes)) best = it;
      }
      if (best != kept_.end()) {
        const Buffer found = *best;
        kept_.erase(best);
        return found;
      }
    }
    const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = std::aligned_alloc(kHugePage, rounded);
    if (data != nullptr) madvise(data, rounded, MADV_HUGEPAGE);
    return {data, rounded};
  }

  // Keeps a buffer, and frees the oldest ones where more than kLimit bytes would be kept.
  void give(Buffer buffer) {
    madvise(buffer.data, buffer.bytes, MADV_FREE);
    const std::lock_guard guard(mutex_);
    kept_.push_back(buffer);
    int64_t total = 0;
    for (const Buffer& kept : kept_) total += kept.bytes;
    while (total > kLimit) total -= drop_oldest();
  }

  void clear() {
    const std::lock_guard guard(mutex_);
    while (!kept_.empty()) drop_oldest();
  }

 private:
  static constexpr int64_t kHugePage = int64_t{2} << 20;
  static constexpr int64_t kLimit = int64_t{2} << 30;

  int64_t drop_oldest() {
    const Buffer oldest = kept_.front();
    kept_.erase(kept_.begin());
    std::free(oldest.data);
    return oldest.bytes;
  }

  std::mutex mutex_;
  std::vector<Buffer> kept_;
};

}  // namespace e3
