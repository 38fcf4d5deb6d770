// A CPU allocator for torch that keeps the pages of large freed blocks for the blocks that come.
//
// The C library either hands such a block back to the system when it is freed, and then every page of the next tensor
// is a fault that takes longer than an elementwise operation on it; or it keeps it on a heap that fragments. Here blocks
// lie in one range of addresses, the smallest free piece that is large enough serves, and what is kept never makes the
// process larger than its live blocks have been at once: where fresh pages would, as many idle ones are handed back.
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace {

constexpr size_t kLarge = size_t(1) << 20;  // smaller ones are the C library's
constexpr size_t kPage = size_t(1) << 12;

const c10::Device kCpu(c10::DeviceType::CPU);

struct Counts {
  uint64_t live, idle, most_live, fresh;  // bytes; `idle` and free ones that hold pages, `fresh` got pages of the system
};

// Free pieces of the range, none beside another of its kind.
class Pieces {
 public:
  void add(uintptr_t begin, size_t size) {
    auto next = by_place_.lower_bound(begin);
    if (next != by_place_.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second == begin) {
        begin = before->first, size += before->second;
        remove(before);
      }
    }
    if (next != by_place_.end() && begin + size == next->first) {
      size += next->second;
      remove(next);
    }
    by_place_.emplace(begin, size);
    by_size_.emplace(size, begin);
  }

  // The first `size` bytes of the smallest piece that has them; 0 if none has.
  uintptr_t take(size_t size) {
    auto found = by_size_.lower_bound({size, 0});
    if (found == by_size_.end()) return 0;
    auto [all, begin] = *found;
    remove(by_place_.find(begin));
    if (all > size) add(begin + size, all - size);
    return begin;
  }

  // The smallest piece, or the end of it with at most `size` bytes.
  std::pair<uintptr_t, size_t> take_least(size_t size) {
    auto [all, begin] = *by_size_.begin();
    remove(by_place_.find(begin));
    if (all <= size) return {begin, all};
    add(begin, all - size);
    return {begin + all - size, size};
  }

 private:
  void remove(std::map<uintptr_t, size_t>::iterator piece) {
    by_size_.erase({piece->second, piece->first});
    by_place_.erase(piece);
  }

  std::map<uintptr_t, size_t> by_place_;
  std::set<std::pair<size_t, uintptr_t>> by_size_;
};

class Blocks {
 public:
  // Addresses alone, four times the memory of this machine, so that pieces don't run out.
  Blocks() {
    for (size_t size = (size_t)sysconf(_SC_PHYS_PAGES) * kPage * 4; size > kLarge; size /= 2) {
      void *got = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (got == MAP_FAILED) continue;
      madvise(got, size, MADV_HUGEPAGE);
      empty_.add((uintptr_t)got, size);
      return;
    }
  }

  void *take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t size = (bytes + kPage - 1) / kPage * kPage;
    uintptr_t block = idle_.take(size);
    if (block) {
      counts_.idle -= size;
    } else {
      block = empty_.take(size);
      if (!block) return nullptr;
      counts_.fresh += size;
    }
    counts_.live += size;
    if (counts_.live > counts_.most_live) counts_.most_live = counts_.live;
    // A sixteenth less than that: what isn't allocated here has its own peaks at other times.
    const size_t limit = (counts_.most_live - counts_.most_live / 16) / kPage * kPage;
    while (counts_.idle && counts_.live + counts_.idle > limit) hand_back(counts_.live + counts_.idle - limit);
    live_.emplace((void *)block, size);
    tell_profiler((void *)block, (int64_t)size);
    return (void *)block;
  }

  // Whether it is one of these blocks.
  bool give_back(void *block) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = live_.find(block);
    if (found == live_.end()) return false;
    size_t size = found->second;
    live_.erase(found);
    counts_.live -= size, counts_.idle += size;
    idle_.add((uintptr_t)block, size);
    tell_profiler(block, -(int64_t)size);
    return true;
  }

  // All idle pages; what was most in use is forgotten.
  void hand_back_idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    while (counts_.idle) hand_back(counts_.idle);
    counts_.most_live = counts_.live;
  }

  // A child has the thread that forked alone: another one's lock would stay for good.
  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

  Counts counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    return counts_;
  }

 private:
  void hand_back(size_t wanted) {
    auto [begin, size] = idle_.take_least(wanted);
    madvise((void *)begin, size, MADV_DONTNEED);
    empty_.add(begin, size);
    counts_.idle -= size;
  }

  void tell_profiler(void *block, int64_t change) {
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(block, change, counts_.live, counts_.live + counts_.idle, kCpu);
  }

  std::mutex mutex_;
  std::unordered_map<void *, size_t> live_;
  Pieces idle_, empty_;  // with pages, and without
  Counts counts_ = {};
};

// Never destroyed: tensors may outlive everything.
Blocks &blocks() {
  static Blocks *all = new Blocks;
  return *all;
}

c10::Allocator *torchs = nullptr;

// oneDNN frees by the address alone (`raw_deleter`), so there is one way for blocks of either kind.
void give_back(void *block) {
  bool page = (uintptr_t)block % kPage == 0;
  if (!page || !blocks().give_back(block)) torchs->raw_deleter()(block);
}

class Reusing final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void *block = bytes < kLarge ? nullptr : blocks().take(bytes);
    // torch's own says it best where there is no memory.
    if (!block) block = torchs->raw_allocate(bytes);
    return {block, block, &give_back, kCpu};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void *to, const void *from, size_t count) const override { default_copy_data(to, from, count); }
};

}  // namespace

extern "C" {

// From now on. Not from several threads at once.
void dsk_reuse_memory(void) {
  static Reusing *reusing = new Reusing;
  if (torchs) return;
  torchs = c10::GetCPUAllocator();
  pthread_atfork([] { blocks().before_fork(); }, [] { blocks().after_fork(); }, [] { blocks().after_fork(); });
  c10::SetCPUAllocator(reusing, 255);
}

void dsk_hand_back_memory(void) { blocks().hand_back_idle(); }

void dsk_memory_counts(uint64_t *four) {
  Counts counts = blocks().counts();
  four[0] = counts.live, four[1] = counts.idle, four[2] = counts.most_live, four[3] = counts.fresh;
}
}
