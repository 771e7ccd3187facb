// Memory for large results: what a freed result leaves is kept for the next one.
//
// Fresh memory costs a page fault and the clearing of every page, together as much time as the kernel that fills it.
// Memory that is kept is marked MADV_FREE: where memory runs short the system takes it back, else the next result finds
// it mapped.
#pragma once

#include <sys/mman.h>

#include <cstdint>
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
    return map((bytes + kHugePage - 1) / kHugePage * kHugePage);
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

  // Of its own mapping: what malloc has had in use before is of small pages.
  static Buffer map(int64_t bytes) {
    void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return {nullptr, 0};
    char* begin = static_cast<char*>(mapped);
    const int64_t before = -reinterpret_cast<intptr_t>(begin) & (kHugePage - 1);
    if (before > 0) munmap(begin, before);
    munmap(begin + before + bytes, kHugePage - before);
    madvise(begin + before, bytes, MADV_HUGEPAGE);
    return {begin + before, bytes};
  }

  int64_t drop_oldest() {
    const Buffer oldest = kept_.front();
    kept_.erase(kept_.begin());
    munmap(oldest.data, oldest.bytes);
    return oldest.bytes;
  }

  std::mutex mutex_;
  std::vector<Buffer> kept_;
};

}  // namespace e3
