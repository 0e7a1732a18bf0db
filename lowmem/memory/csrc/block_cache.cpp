// Blocks of PyTorch's CPU memory, kept when they are freed and handed out again to the next request of the same size.
//
// A block from the system has pages that the kernel must zero, one fault each; a step that frees and requests the same sizes over and
// over pays that for every tensor. A block from malloc's heap shares it with small objects, which cut it to pieces: an aligned request
// is larger than the hole that an equal one left, so the heap grows where it could reuse. Here blocks in use and blocks kept never take
// more together than blocks in use took at their peak: before that bound would be passed, those freed longest ago go back to the system.
//
// With a limit a block that would take the whole process past it is refused with PyTorch's own error, before the system is asked. malloc
// and mmap of every other library go on working: many of them do not look at what they get.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <exception>
#include <iterator>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

namespace {

struct Block {
  void* address;
  std::size_t size;
};

void unmap(const Block& block) {
  // A kernel that has no room to split a mapping refuses; the pages are freed all the same, the addresses are lost.
  if (munmap(block.address, block.size) != 0) madvise(block.address, block.size, MADV_DONTNEED);
}

// Bytes of this process that are resident, files' pages included; 0 where the system does not tell. About 2 microseconds.
struct Resident {
  int file = -1;
  std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));

  std::size_t bytes() noexcept {
    if (file < 0) file = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    char text[128];
    const ssize_t length = file < 0 ? -1 : pread(file, text, sizeof text - 1, 0);
    if (length <= 0) return 0;
    text[length] = 0;
    char* second = nullptr;
    std::strtoull(text, &second, 10);
    return std::strtoull(second, nullptr, 10) * page;
  }

  // An open file goes on telling of the process that opened it: for a child after fork.
  void reopen() noexcept {
    if (file >= 0) close(file);
    file = -1;
  }
};

struct BlockCache {
  std::mutex mutex;
  std::unordered_map<void*, std::size_t> in_use;
  std::list<Block> kept;  // freed first comes first
  std::unordered_map<std::size_t, std::deque<std::list<Block>::iterator>> kept_of_size;  // in the same order
  std::size_t in_use_bytes = 0, peak_bytes = 0, kept_bytes = 0, reused = 0, mapped = 0;
  std::size_t limit_bytes = 0;  // of the whole process; 0: none
  std::size_t other_bytes = 0;  // most that was resident and no block of ours, since the last release
  Resident resident;

  // Null when the system has no more, or the limit is reached, though nothing is kept.
  void* take(std::size_t size) {
    void* address = reuse(size);
    if (address == nullptr) {
      if (!make_room(size)) return nullptr;
      shrink_to(std::max(peak_bytes, in_use_bytes + size) - size);
      address = map(size);
    }
    if (address == nullptr) {
      shrink_to(0);
      address = map(size);
    }
    if (address == nullptr) return nullptr;
    try {
      in_use.emplace(address, size);
    } catch (const std::bad_alloc&) {
      unmap({address, size});
      return nullptr;
    }
    in_use_bytes += size;
    peak_bytes = std::max(peak_bytes, in_use_bytes);
    return address;
  }

  // Unmap kept blocks until `size` more bytes stay below the limit; false if they never do.
  //
  // Blocks that are not touched yet are not resident, but will be: they count whole, beside the most that all else ever took.
  bool make_room(std::size_t size) noexcept {
    if (limit_bytes == 0) return true;
    const std::size_t now = resident.bytes(), ours = in_use_bytes + kept_bytes;
    other_bytes = std::max(other_bytes, now > ours ? now - ours : 0);
    const std::size_t room = limit_bytes > other_bytes + size ? limit_bytes - other_bytes - size : 0;
    shrink_to(room);
    return in_use_bytes + kept_bytes <= room && limit_bytes >= other_bytes + size;
  }

  // False for a block that is not from here.
  bool give(void* address) noexcept {
    const auto found = in_use.find(address);
    if (found == in_use.end()) return false;
    const Block block{address, found->second};
    in_use.erase(found);
    in_use_bytes -= block.size;
    if (!keep(block)) unmap(block);
    return true;
  }

  // Unmap kept blocks until all blocks together take at most `bytes`, or none is kept.
  void shrink_to(std::size_t bytes) noexcept {
    while (!kept.empty() && in_use_bytes + kept_bytes > bytes) {
      const Block oldest = kept.front();
      const auto same = kept_of_size.find(oldest.size);
      same->second.pop_front();
      if (same->second.empty()) kept_of_size.erase(same);
      kept.pop_front();
      kept_bytes -= oldest.size;
      unmap(oldest);
    }
  }

 private:
  bool keep(const Block& block) noexcept {
    try {
      kept.push_back(block);
    } catch (const std::bad_alloc&) {
      return false;
    }
    try {
      kept_of_size[block.size].push_back(std::prev(kept.end()));
    } catch (const std::bad_alloc&) {
      kept.pop_back();
      return false;
    }
    kept_bytes += block.size;
    return true;
  }

  void* reuse(std::size_t size) noexcept {
    const auto same = kept_of_size.find(size);
    if (same == kept_of_size.end() || same->second.empty()) return nullptr;
    const auto newest = same->second.back();
    void* address = newest->address;
    same->second.pop_back();
    if (same->second.empty()) kept_of_size.erase(same);
    kept.erase(newest);
    kept_bytes -= size;
    ++reused;
    return address;
  }

  void* map(std::size_t size) noexcept {
    void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) return nullptr;
    ++mapped;
    return address;
  }
};

BlockCache& cache() {
  static BlockCache* const only = new BlockCache;  // never destroyed: tensors may outlive every other static
  return *only;
}

c10::Allocator* usual = nullptr;  // PyTorch's own: for small blocks, and for the error message when memory is out
std::size_t smallest = 0, page = 0;

void release(void* address) {
  {
    const std::lock_guard<std::mutex> lock(cache().mutex);
    if (cache().give(address)) return;
  }
  usual->raw_deallocate(address);
}

struct CachingAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t size) override {
    if (size < smallest) return allocate_small(size);
    void* address = nullptr;
    {
      const std::lock_guard<std::mutex> lock(cache().mutex);
      address = cache().take((size + page - 1) / page * page);
    }
    if (address == nullptr) return allocate_otherwise(size);
    return {address, address, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }

 private:
  static c10::DataPtr allocate_otherwise(std::size_t size) {
    std::size_t limit = 0, resident = 0;
    {
      const std::lock_guard<std::mutex> lock(cache().mutex);
      if (!cache().make_room((size + page - 1) / page * page)) {
        limit = cache().limit_bytes;
        resident = cache().resident.bytes();
      }
    }
    TORCH_CHECK_WITH(OutOfMemoryError, limit == 0, "can't allocate memory: ", size, " bytes more than the ", resident,
                     " bytes that are resident would pass the limit of ", limit, " bytes");
    return usual->allocate(size);
  }

  static c10::DataPtr allocate_small(std::size_t size) {
    try {
      return usual->allocate(size);
    } catch (const std::exception&) {
      const std::lock_guard<std::mutex> lock(cache().mutex);
      cache().shrink_to(0);
    }
    return usual->allocate(size);
  }
};

}  // namespace

extern "C" {

// Put the cache before PyTorch's allocator, for blocks of at least `from_bytes`. Blocks that exist already are none of its business.
void lowmem_install_block_cache(std::size_t from_bytes) {
  if (usual != nullptr) return;
  smallest = from_bytes;
  page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  usual = c10::GetCPUAllocator();
  pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); },
                 [] {
                   cache().resident.reopen();
                   cache().mutex.unlock();
                 });
  c10::SetCPUAllocator(new CachingAllocator, /*priority=*/255);
}

// Give every kept block back; the peak starts anew from what is in use.
void lowmem_release_block_cache() {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  cache().shrink_to(0);
  cache().peak_bytes = cache().in_use_bytes;
  cache().other_bytes = 0;
}

// Refuse blocks that would take the resident memory of the process past `limit_bytes`; 0 lifts the limit. 0 if the system does not tell it.
int lowmem_limit_block_cache(std::size_t limit_bytes) {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  if (cache().resident.bytes() == 0) return 0;
  cache().limit_bytes = limit_bytes;
  cache().other_bytes = 0;
  return 1;
}

// in_use_bytes, kept_bytes, peak_bytes of those in use, blocks reused, blocks mapped
void lowmem_block_cache_counts(std::uint64_t* counts) {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  const BlockCache& now = cache();
  counts[0] = now.in_use_bytes;
  counts[1] = now.kept_bytes;
  counts[2] = now.peak_bytes;
  counts[3] = now.reused;
  counts[4] = now.mapped;
}
}
