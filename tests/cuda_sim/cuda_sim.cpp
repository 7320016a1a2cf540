// The runtime of cuda_sim.h: blocks, warps and threads as fibers, and checks of memory accesses.
// This file is not instrumented. The loads and stores of the kernels call the __tsan_* functions.
#include "cuda_sim.h"

#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <new>
#include <random>
#include <vector>

// the indices, which are constants for a kernel
extern "C" {
struct {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
} cuda_sim_indices;
}
asm(".globl threadIdx, blockIdx, blockDim, gridDim\n"
    ".set threadIdx, cuda_sim_indices\n.set blockIdx, cuda_sim_indices + 12\n"
    ".set blockDim, cuda_sim_indices + 24\n.set gridDim, cuda_sim_indices + 36\n");

// saves the callee-saved registers on the current stack, and continues where `to` was suspended
extern "C" void cuda_sim_switch(void** from, void* to);
#if defined(__x86_64__)
asm(".globl cuda_sim_switch\n.hidden cuda_sim_switch\ncuda_sim_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
constexpr int SAVED = 6;
#elif defined(__aarch64__)
asm(".globl cuda_sim_switch\n.hidden cuda_sim_switch\ncuda_sim_switch:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
    "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp d8, d9, [sp, #80]\n"
    "stp d10, d11, [sp, #96]\nstp d12, d13, [sp, #112]\n"
    "stp d14, d15, [sp, #128]\nstp x29, x30, [sp, #144]\n"
    "mov x2, sp\nstr x2, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
    "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp d8, d9, [sp, #80]\n"
    "ldp d10, d11, [sp, #96]\nldp d12, d13, [sp, #112]\n"
    "ldp d14, d15, [sp, #128]\nldp x29, x30, [sp, #144]\nadd sp, sp, #160\nret\n");
#endif

namespace cuda_sim {
namespace {

constexpr size_t STACK = 128 << 10;
constexpr int MAX_THREADS = 1024;
constexpr size_t MAX_SHARED = 256 << 10;

// -- the running block ---------------------------------------------------------------------------

enum State { READY, AT_BARRIER, IN_WARP, DONE };
struct Copy {  // from global to shared memory; executed when its thread waits for its group
  char* to;
  const char* from;
  uint32_t size, zeros, group;
  Site site;
};
struct Fiber {
  void* context = nullptr;
  char* stack = nullptr;
  State state = DONE;
  Site site{};
  unsigned int mask = 0;
  uint64_t value = 0;  // the operand of a warp operation, and then its result
  int source = 0;
  uint32_t warp_epoch = 0;
  bool waited = false;  // for the previous kernel
  std::deque<Copy> copies;
  uint32_t group = 0;  // the group of the next copies, which are not committed yet
};
struct Group {  // lanes in the same warp operation
  unsigned int arrived, mask;
  Kind kind;
  Site site;
};
struct Warp {
  unsigned int done;
  Group groups[32];  // indexed by the lowest lane of the mask; concurrent masks are disjoint
};

std::deque<Kernel>& kernels() {  // libraries add theirs when loaded; Python keeps addresses
  static std::deque<Kernel> all;
  return all;
}
Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / 32];
std::vector<int> queue;
size_t queue_head;
void* scheduler;
jmp_buf launcher;
int current = -1, n_threads, n_done, n_waiting;
uint3 thread_indices[MAX_THREADS];
uint32_t first_thread;  // the index in the grid of the block's thread 0, from 1
Votes votes, result_of_votes;
uint32_t block_index, block_epoch, block_stamp, now_time;
void (*entry)(void**);
void** entry_arguments;
char message[2048];
std::mt19937 order_rng;
int order;  // 0: ascending, 1: descending, 2: random
bool overlapped;  // whether the launch may start before the previous kernel ends
struct Range { uint64_t begin, end; };
std::vector<Range> before;  // memory written directly before by work other than our kernels
uint64_t n_accesses, max_accesses;  // of the launch, including barriers and warp operations

// -- memory: which thread accessed a cell last, and when -----------------------------------------

enum Mode { READ, WRITE, ATOMIC };
struct Access {
  uint32_t thread;  // index in the grid, from 1; 0 for none
  uint32_t block_epoch, warp_epoch, time;
};
struct Cell {
  uint32_t stamp;  // launch, or block for shared memory; a cell with an older stamp is empty
  uint32_t copying;  // the thread whose asynchronous copy will fill the cell
  bool split;  // whether the bytes have separate cells
  Access write, atomic, other_atomic, read, other_read;  // the last ones, also by other threads
  bool is_set() const { return write.thread || atomic.thread; }
};
struct Cells {  // zero-initialized; uses physical memory only where accessed
  Cell* at = nullptr;
  size_t n = 0;
  void reserve(size_t wanted) {
    const bool is_wasteful = n > (1 << 20) && wanted < n / 16;  // after a launch on a large array
    if (wanted <= n && !is_wasteful) return;
    if (at) munmap(at, n * sizeof(Cell));
    n = std::max(wanted, (size_t)1);
    at = (Cell*)mmap(nullptr, n * sizeof(Cell), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at != MAP_FAILED) return;
    at = nullptr, n = 0;
    throw std::bad_alloc();
  }
};
struct Extent {  // an array of the launch
  uintptr_t begin, end;
  uint32_t granule;  // bytes per element
  uint32_t writable, argument;
  size_t first_cell;
  uint64_t read, written;  // bytes, summed over all threads
};
struct Launch {  // a launch, and the last accesses to its arrays
  uint32_t stamp = 0;
  std::vector<Extent> extents;
  Cells cells;
};
constexpr uint32_t N_LAUNCHES = 8;
Launch launches[N_LAUNCHES];  // the current launch and earlier ones
Launch* launch = &launches[0];
uint32_t first_running;  // the oldest launch that may still be running; 0: none

struct Shared {  // cells of 4 bytes, and cells of one byte after a narrower access
  uintptr_t begin = 0, end = 0;
  Cells words, bytes;
  void place(uintptr_t b, uintptr_t e) {
    begin = b, end = e;
    words.reserve((e - b) / 4 + 1);
    bytes.reserve(e - b + 4);
  }
} dynamic_shared_memory, static_shared_memory;
alignas(1024) char dynamic_memory[MAX_SHARED];
uintptr_t constant_begin, constant_end, stack_begin, stack_end;

// a release by a block: __threadfence followed by an atomic operation
struct Release { uint32_t covers, at; };
std::vector<Release> releases;
std::vector<uint32_t> fences, acquires;
std::vector<uint32_t> blocks;  // in execution order

// -- messages ------------------------------------------------------------------------------------

struct Where {  // a place in the source: an address, or file and line; slow to pass by value
  void* pc = nullptr;
  Site site{};
};
const char* base_name(const char* path) {
  const char* slash = strrchr(path ? path : "?", '/');
  return slash ? slash + 1 : path;
}
int describe_thread(char* out, size_t n, uint32_t thread) {
  uint32_t t = (thread - 1) % n_threads, b = (thread - 1) / n_threads;
  const dim3 &d = cuda_sim_indices.block_dim, &g = cuda_sim_indices.grid_dim;
  return snprintf(out, n, "thread (%u,%u,%u) of block (%u,%u,%u)", t % d.x, t / d.x % d.y,
                  t / d.x / d.y, b % g.x, b / g.x % g.y, b / g.x / g.y);
}
uint32_t me() { return first_thread + current; }

[[noreturn, gnu::cold]] void stop(const Where& where, const char* format, ...) {
  char who[96];
  describe_thread(who, sizeof who, me());
  int n = snprintf(message, sizeof message, "%s: ", who);
  va_list list;
  va_start(list, format);
  n += vsnprintf(message + n, sizeof message - n, format, list);
  va_end(list);
  Dl_info info;
  if (where.site.file)
    snprintf(message + n, sizeof message - n, ", %s:%d", base_name(where.site.file),
             where.site.line);
  else if (where.pc && dladdr(where.pc, &info))  // cuda_simulator.py converts it to file and line
    snprintf(message + n, sizeof message - n, " @0x%zx",
             (size_t)((char*)where.pc - (char*)info.dli_fbase) - 1);
  _longjmp(launcher, 1);
}

void count(const Where& where) {
  if (++n_accesses > max_accesses) stop(where, "the kernel does not end");
}

void switch_to_scheduler() { cuda_sim_switch(&fibers[current].context, scheduler); }

// -- races ---------------------------------------------------------------------------------------

inline bool ordered(const Access& a) {
  if (!a.thread || a.thread == me()) return true;
  const uint32_t in_block = a.thread - first_thread;
  if (in_block < (uint32_t)n_threads) {
    if (a.block_epoch < block_epoch) return true;
    return in_block / 32 == (uint32_t)current / 32 && a.warp_epoch < fibers[current].warp_epoch;
  }
  const Release& r = releases[(a.thread - 1) / n_threads];
  return a.time <= r.covers && r.at < acquires[block_index];
}

[[noreturn, gnu::cold]] void stop_race(const Access& a, const char* what, const Where& where,
                                       uintptr_t p) {
  char who[96];
  describe_thread(who, sizeof who, a.thread);
  stop(where, "race: %s by %s at %p, without a barrier between", what, who, (void*)p);
}

inline void check_order(const Access& a, const char* what, const Where& where, uintptr_t p) {
  if (!ordered(a)) stop_race(a, what, where, p);
}

[[noreturn, gnu::cold]] void stop_copying(const Cell& c, Mode mode, const Where& where,
                                          uintptr_t p) {
  char who[96];
  describe_thread(who, sizeof who, c.copying);
  stop(where, "race: a %s of shared memory at %p, which an asynchronous copy by %s fills: that "
       "thread has not waited for it", mode == READ ? "read" : "write", (void*)p, who);
}

void touch(Cell& c, uint32_t stamp, Mode mode, bool must_be_set, const Where& where, uintptr_t p) {
  if (c.stamp != stamp) c = Cell{stamp};
  if (c.copying) stop_copying(c, mode, where, p);
  const char* after_write = mode == READ ? "a read after a write" : "a write after a write";
  check_order(c.write, after_write, where, p);
  if (mode != ATOMIC) {
    check_order(c.atomic, after_write, where, p);
    check_order(c.other_atomic, after_write, where, p);
  }
  if (mode != WRITE && must_be_set && !c.is_set())
    stop(where, "read of shared memory that no thread of the block has written, at %p", (void*)p);
  if (mode != READ) {
    check_order(c.read, "a write after a read", where, p);
    check_order(c.other_read, "a write after a read", where, p);
  }
  Access now{me(), block_epoch, fibers[current].warp_epoch, ++now_time};
  if (mode == WRITE) {
    c.write = now;
    c.atomic = c.other_atomic = c.read = c.other_read = {};
    return;
  }
  Access& last = mode == READ ? c.read : c.atomic;
  Access& other = mode == READ ? c.other_read : c.other_atomic;
  if (last.thread && last.thread != now.thread) other = last;
  last = now;
}

// calls `act` with the cell of each of the bytes p .. p + size - 1 of shared memory
template <class F> void each_cell(Shared& shared, uintptr_t p, size_t size, F act) {
  const size_t begin = p - shared.begin, end = begin + size;
  for (size_t w = begin / 4; w * 4 < end; w++) {
    Cell& word = shared.words.at[w];
    if (word.stamp != block_stamp) word = Cell{block_stamp};
    if (!word.split && w * 4 >= begin && w * 4 + 4 <= end) {
      act(word);
      continue;
    }
    if (!word.split) {
      for (size_t i = w * 4; i < w * 4 + 4; i++) shared.bytes.at[i] = word;
      word.split = true;
    }
    for (size_t i = std::max(w * 4, begin); i < std::min(w * 4 + 4, end); i++)
      act(shared.bytes.at[i]);
  }
}

Shared* shared_memory_of(uintptr_t p, size_t size) {
  for (Shared* s : {&dynamic_shared_memory, &static_shared_memory})
    if (p >= s->begin && p + size <= s->end) return s;
  return nullptr;
}

// -- one access ----------------------------------------------------------------------------------

[[noreturn, gnu::cold]] void out_of_bounds(uintptr_t p, size_t size, Mode mode,
                                           const Where& where) {
  const char* verb = mode == READ ? "read" : "write";
  if (!p) stop(where, "%s of %zu bytes at a null pointer", verb, size);
  uintptr_t dynamic_begin = (uintptr_t)dynamic_memory;
  if (p >= dynamic_begin && p < dynamic_begin + MAX_SHARED)
    stop(where, "%s of %zu bytes beyond the %zu bytes of dynamic shared memory", verb, size,
         (size_t)(dynamic_shared_memory.end - dynamic_begin));
  const Extent* nearest = nullptr;
  intptr_t distance = 0;
  for (const Extent& e : launch->extents) {
    intptr_t d = p >= e.begin ? (intptr_t)(p + size - e.end) : (intptr_t)(p - e.begin);
    if (!nearest || std::abs(d) < std::abs(distance)) nearest = &e, distance = d;
  }
  if (!nearest) stop(where, "%s of %zu bytes out of bounds", verb, size);
  stop(where, "%s of %zu bytes out of bounds: it %s of argument %u (%zu bytes) by %zd", verb, size,
       distance < 0 ? "begins before the begin" : "ends after the end", nearest->argument,
       (size_t)(nearest->end - nearest->begin), std::abs(distance));
}

bool has_written(const Launch& other, uintptr_t p, size_t size) {
  for (const Extent& e : other.extents)
    if (e.writable && p < e.end && p + size > e.begin) {
      size_t begin = std::max(p, e.begin) - e.begin, end = std::min(p + size, e.end) - e.begin;
      for (size_t i = begin / e.granule; i * e.granule < end; i++) {
        const Cell& c = other.cells.at[e.first_cell + i];
        if (c.stamp == other.stamp && c.is_set()) return true;
      }
    }
  return false;
}

void check_overlap(uintptr_t p, size_t size, Mode mode, const Where& where) {
  if (!overlapped || fibers[current].waited) return;
  if (mode != READ) stop(where, "write to global memory before wait_for_previous_kernel()");
  for (const Range& r : before)
    if (p < r.end && p + size > r.begin)
      stop(where, "read of what the work before wrote, before wait_for_previous_kernel()");
  if (!first_running) return;
  for (const Launch& other : launches)
    if (other.stamp >= first_running && other.stamp < launch->stamp && has_written(other, p, size))
      stop(where, "read of what a kernel before wrote, before wait_for_previous_kernel()");
}

bool access_array(uintptr_t p, size_t size, Mode mode, bool counted, const Where& where) {
  for (Extent& e : launch->extents) {
    if (p < e.begin || p >= e.end) continue;
    if (p + size > e.end) return false;
    if (mode != READ && !e.writable) stop(where, "write to a const array at %p", (void*)p);
    check_overlap(p, size, mode, where);
    if (counted && mode != WRITE) e.read += size;
    if (counted && mode != READ) e.written += size;
    count(where);
    if (e.writable)
      for (size_t i = (p - e.begin) / e.granule; i * e.granule < p - e.begin + size; i++)
        touch(launch->cells.at[e.first_cell + i], launch->stamp, mode, false, where, p);
    return true;
  }
  return false;
}

void access(uintptr_t p, size_t size, Mode mode, const Where& where) {
  if (current < 0) return;
  if (p >= stack_begin && p < stack_end) {
    char* own = fibers[current].stack;
    if (p < (uintptr_t)own || p >= (uintptr_t)own + STACK)
      stop(where, "access to another thread's local memory at %p", (void*)p);
    return;
  }
  if (p - (uintptr_t)&cuda_sim_indices < sizeof cuda_sim_indices) return;
  if (Shared* shared = shared_memory_of(p, size)) {
    count(where);
    each_cell(*shared, p, size, [&](Cell& c) { touch(c, block_stamp, mode, true, where, p); });
    return;
  }
  if (access_array(p, size, mode, true, where)) return;
  if (mode == READ && p >= constant_begin && p + size <= constant_end) return;
  out_of_bounds(p, size, mode, where);
}

// -- asynchronous copies -------------------------------------------------------------------------

// Bounds and races are checked when the copy is issued, and races again when it is executed,
// because the hardware may execute it at either time.
void ask_for_copy(Copy copy) {
  Where where{nullptr, copy.site};
  const uintptr_t to = (uintptr_t)copy.to, from = (uintptr_t)copy.from;
  if (copy.size != 4 && copy.size != 8 && copy.size != 16)
    stop(where, "an asynchronous copy of %u bytes: it takes 4, 8 or 16", copy.size);
  if (copy.zeros > copy.size)
    stop(where, "an asynchronous copy of %u bytes with %u zeros", copy.size, copy.zeros);
  if (to % copy.size || from % copy.size)
    stop(where, "misaligned asynchronous copy of %u bytes from %p to %p", copy.size,
         (void*)copy.from, (void*)copy.to);
  Shared* shared = shared_memory_of(to, copy.size);
  if (!shared && to >= (uintptr_t)dynamic_memory && to < (uintptr_t)dynamic_memory + MAX_SHARED)
    out_of_bounds(to, copy.size, WRITE, where);
  if (!shared) stop(where, "an asynchronous copy to %p, which is not shared memory", (void*)to);
  if (copy.size > copy.zeros && !access_array(from, copy.size - copy.zeros, READ, true, where))
    out_of_bounds(from, copy.size - copy.zeros, READ, where);
  each_cell(*shared, to, copy.size, [&](Cell& c) {
    touch(c, block_stamp, WRITE, false, where, to);
    c.copying = me();
  });
  fibers[current].copies.push_back(copy);
}

void make_copy(const Copy& copy) {
  Where where{nullptr, copy.site};
  const uintptr_t to = (uintptr_t)copy.to;
  const size_t size = copy.size - copy.zeros;
  if (size) access_array((uintptr_t)copy.from, size, READ, false, where);
  memcpy(copy.to, copy.from, size);
  memset(copy.to + size, 0, copy.zeros);
  each_cell(*shared_memory_of(to, copy.size), to, copy.size, [&](Cell& c) {
    c.copying = 0;
    touch(c, block_stamp, WRITE, false, where, to);
  });
}

// -- fibers --------------------------------------------------------------------------------------

void fiber_main() {
  for (;;) {
    entry(entry_arguments);
    Fiber& f = fibers[current];
    if (!f.copies.empty())
      stop({nullptr, f.copies[0].site}, "the thread ends before it waits for an asynchronous copy");
    if (overlapped && !f.waited) stop({}, "the thread ends without wait_for_previous_kernel()");
    f.state = DONE;
    warps[current / 32].done |= 1u << current % 32;
    n_done++;
    switch_to_scheduler();
  }
}

void wake(int i) {
  fibers[i].state = READY;
  queue.push_back(i);
}

void release_block() {
  const Site* site = nullptr;
  for (int i = 0; i < n_threads; i++)
    if (fibers[i].state == AT_BARRIER) {
      if (site && (site->line != fibers[i].site.line || strcmp(site->file, fibers[i].site.file)))
        stop({}, "threads of one block wait at different barriers: %s:%d and %s:%d",
             base_name(site->file), site->line, base_name(fibers[i].site.file),
             fibers[i].site.line);
      site = &fibers[i].site;
    }
  block_epoch++;
  n_waiting = 0;
  result_of_votes = votes;
  votes = {0, 1, 0};
  for (int i = 0; i < n_threads; i++)
    if (fibers[i].state == AT_BARRIER) wake(i);
}

void run_block() {
  block_epoch = 0;
  block_stamp++;
  n_done = n_waiting = 0;
  votes = {0, 1, 0};
  queue.clear();
  queue_head = 0;
  for (int i = 0; i < n_threads; i++) {
    fibers[i].warp_epoch = fibers[i].group = 0;
    fibers[i].waited = false;
    fibers[i].copies.clear();
    wake(i);
  }
  for (int i = 0; i * 32 < n_threads; i++) {
    warps[i].done = 0;
    for (Group& g : warps[i].groups) g.arrived = 0;
  }
  if (order == 1) std::reverse(queue.begin(), queue.end());
  if (order == 2) std::shuffle(queue.begin(), queue.end(), order_rng);
  for (;;) {
    if (queue_head == queue.size()) {
      if (n_done == n_threads) return;
      if (n_waiting && n_waiting + n_done == n_threads) {
        current = 0;
        release_block();
        continue;
      }
      int a = -1, b = -1;  // threads at different barriers, or in an incomplete warp
      for (int i = 0; i < n_threads; i++) {
        if (fibers[i].state == IN_WARP && a < 0) a = i;
        if (fibers[i].state == AT_BARRIER && b < 0) b = i;
      }
      current = a >= 0 ? a : b;
      if (a >= 0)
        stop({nullptr, fibers[a].site},
             "a warp operation with mask %08x, to which not all of these lanes come%s",
             fibers[a].mask, b >= 0 ? " (others wait at a block barrier)" : "");
      stop({nullptr, fibers[b].site}, "a barrier to which other threads never come");
    }
    if (order == 2) {
      size_t left = queue.size() - queue_head;
      std::swap(queue[queue_head], queue[queue_head + order_rng() % left]);
    }
    current = queue[queue_head++];
    if (queue_head > 65536) queue.erase(queue.begin(), queue.begin() + queue_head), queue_head = 0;
    Fiber& f = fibers[current];
    cuda_sim_indices.thread = thread_indices[current];
    if (!f.stack) {  // the first switch to this stack returns into fiber_main
      f.stack = (char*)stack_begin + STACK * current;
      // stagger the stacks: equal offsets would compete for few cache lines
      uintptr_t* top = (uintptr_t*)(f.stack + STACK - 64 - current % 61 * 320);
#if defined(__x86_64__)
      top[-2] = (uintptr_t)fiber_main;  // as after a call: 8 below a multiple of 16
      f.context = top - 2 - SAVED;
#else
      f.context = (char*)top - 160;
      ((uintptr_t*)f.context)[19] = (uintptr_t)fiber_main;
#endif
    }
    cuda_sim_switch(&scheduler, f.context);
  }
}

unsigned int reduced(Reduction how, unsigned int a, unsigned int b) {
  switch (how) {
    case ADD: return a + b;
    case MIN: return std::min((int)a, (int)b);
    case MAX: return std::max((int)a, (int)b);
    case UMIN: return std::min(a, b);
    case UMAX: return std::max(a, b);
    case AND: return a & b;
    case OR: return a | b;
    default: return a ^ b;
  }
}

// A warp operation waits for all lanes of the mask. The result of a shuffle is the value of the
// source lane, the result of a ballot is the set of lanes with nonzero values, and the result of a
// reduction combines all values.
uint64_t rendezvous(Kind kind, unsigned int mask, uint64_t value, int source, Site site) {
  count({nullptr, site});
  Fiber& f = fibers[current];
  Warp& w = warps[current / 32];
  int lane = current % 32, first = current - lane, present = std::min(32, n_threads - first);
  if (present < 32) mask &= (1u << present) - 1;
  if (!(mask >> lane & 1))
    stop({nullptr, site}, "calls a warp operation whose mask leaves it out");
  if (mask & w.done)
    stop({nullptr, site}, "a warp operation's mask names lane %d, which has ended",
         __builtin_ctz(mask & w.done));
  if (kind == SHUFFLE && !(mask >> source & 1))
    stop({nullptr, site}, "a shuffle reads lane %d, which its mask leaves out", source);
  Group& g = w.groups[__builtin_ctz(mask)];
  if (!g.arrived) {
    g = {0, mask, kind, site};
  } else if (g.mask != mask || g.kind != kind || g.site.line != site.line) {
    stop({}, "lanes of one warp are in different warp operations: %s:%d and %s:%d",
         base_name(site.file), site.line, base_name(g.site.file), g.site.line);
  }
  g.arrived |= 1u << lane;
  f.value = value;
  f.source = source;
  f.mask = mask;
  f.site = site;
  f.state = IN_WARP;
  if (g.arrived == mask) {  // the last lane computes the results for all lanes
    g.arrived = 0;
    uint64_t given[32];
    unsigned int ballot = 0;
    bool begun = false;
    uint64_t total = 0;
    for (unsigned int left = mask; left; left &= left - 1) {
      int i = __builtin_ctz(left);
      given[i] = fibers[first + i].value;
      if (given[i]) ballot |= 1u << i;
      if (kind == REDUCE)
        total = begun ? reduced((Reduction)source, total, given[i]) : given[i], begun = true;
    }
    for (unsigned int left = mask; left; left &= left - 1) {
      Fiber& o = fibers[first + __builtin_ctz(left)];
      o.value = kind == SHUFFLE ? given[o.source] : kind == REDUCE ? total : ballot;
      o.warp_epoch += kind == BARRIER;
      wake(first + __builtin_ctz(left));
    }
  }
  switch_to_scheduler();
  return f.value;
}

// finds the static __shared__ memory and the constants of the library that contains a kernel
int find_module(dl_phdr_info* info, size_t, void* kernel) {
  uintptr_t begin = UINTPTR_MAX, end = 0, data_begin = 0, data_end = 0, own = (uintptr_t)kernel;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr)& h = info->dlpi_phdr[i];
    if (h.p_type != PT_LOAD) continue;
    uintptr_t b = info->dlpi_addr + h.p_vaddr, e = b + h.p_memsz;
    begin = std::min(begin, b), end = std::max(end, e);
    if (h.p_flags & PF_W) data_begin = b, data_end = e;
  }
  if (own < begin || own >= end) return 0;
  static_shared_memory.place(data_begin / 4 * 4, data_end);
  constant_begin = begin, constant_end = end;
  return 1;
}

}  // namespace

void add(const Kernel& k) { kernels().push_back(k); }
int lane() { return current % 32; }
void* dynamic_shared() { return dynamic_memory; }
void fail(const char* what, Site s) { stop({nullptr, s}, "%s", what); }
Votes block_barrier(int vote, Site site) {
  Fiber& f = fibers[current];
  count({nullptr, site});
  f.site = site;
  f.state = AT_BARRIER;
  n_waiting++;
  votes = {votes.any | vote, votes.all & vote, votes.count + vote};
  if (n_waiting + n_done == n_threads) release_block();
  switch_to_scheduler();
  return result_of_votes;
}
uint64_t warp_operation(Kind kind, unsigned int mask, uint64_t value, int source, Site site) {
  return rendezvous(kind, mask, value, source, site);
}
void fence() { fences[block_index] = now_time; }
void before_atomic(void* p, int size, Site site) {
  Where where{nullptr, site};
  if ((uintptr_t)p % size) stop(where, "misaligned atomic operation of %d bytes", size);
  access((uintptr_t)p, size, ATOMIC, where);
  if (fences[block_index]) releases[block_index] = {fences[block_index], ++now_time};
  acquires[block_index] = ++now_time;
}
void copy_later(void* to, const void* from, size_t size, size_t zeros, Site site) {
  ask_for_copy({(char*)to, (const char*)from, (uint32_t)size, (uint32_t)zeros,
                fibers[current].group, site});
}
void commit_copies() { fibers[current].group++; }
void wait_for_copies(size_t n) {
  Fiber& f = fibers[current];
  while (!f.copies.empty() && f.copies.front().group + n < f.group) {
    make_copy(f.copies.front());
    f.copies.pop_front();
  }
}
void wait_for_previous_kernel(const char*, int) { fibers[current].waited = true; }
void let_next_kernel_start() {}  // nothing to do: all start orders are checked

}  // namespace cuda_sim

// -- functions that Python calls -----------------------------------------------------------------

using namespace cuda_sim;
extern "C" {
int cuda_sim_n_kernels() { return kernels().size(); }
const Kernel* cuda_sim_kernel(int i) { return &kernels()[i]; }

struct GivenExtent {
  uint64_t begin, end;
  uint32_t granule, writable, argument, unused;
  uint64_t read, written;
};
struct GivenLaunch {
  uint32_t grid[3], block[3];
  uint64_t shared;  // bytes of dynamic shared memory
  void** arguments;
  GivenExtent* extents;
  uint64_t max_accesses;
  uint32_t n_extents, order, seed;
  uint32_t overlapped;
  uint32_t first_running;  // the oldest launch that may still be running; 0 if there is none
  uint32_t number;  // the number of this launch (output)
  Range* before;  // memory written directly before by other work
  uint32_t n_before;
};

static void begin_launch(const Kernel* kernel, const GivenLaunch& g) {
  if (!stack_begin) {
    void* stacks = mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stack_begin = (uintptr_t)stacks;
    stack_end = stack_begin + STACK * MAX_THREADS;
    queue.reserve(1 << 17);
  }
  uint32_t number = launch->stamp + 1;
  launch = &launches[number % N_LAUNCHES];
  launch->stamp = number;
  first_running = g.first_running;
  launch->extents.clear();
  size_t n_cells = 0;
  for (uint32_t i = 0; i < g.n_extents; i++) {
    const GivenExtent& e = g.extents[i];
    launch->extents.push_back(
        {e.begin, e.end, e.granule, e.writable, e.argument, n_cells, 0, 0});
    if (e.writable) n_cells += (e.end - e.begin + e.granule - 1) / e.granule;
  }
  launch->cells.reserve(n_cells);
  dl_iterate_phdr(find_module, (void*)kernel->call);
  dynamic_shared_memory.place((uintptr_t)dynamic_memory, (uintptr_t)dynamic_memory + g.shared);
  cuda_sim_indices.grid_dim = {g.grid[0], g.grid[1], g.grid[2]};
  cuda_sim_indices.block_dim = {g.block[0], g.block[1], g.block[2]};
  n_threads = 0;
  for (uint32_t z = 0; z < g.block[2]; z++)
    for (uint32_t y = 0; y < g.block[1]; y++)
      for (uint32_t x = 0; x < g.block[0]; x++) thread_indices[n_threads++] = {x, y, z};
  entry = kernel->call;
  entry_arguments = g.arguments;
  overlapped = g.overlapped;
  before.assign(g.before, g.before + g.n_before);
  order = g.order;
  order_rng.seed(g.seed);
  now_time = 0;
  n_accesses = 0;
  max_accesses = g.max_accesses;
  const uint32_t n_blocks = g.grid[0] * g.grid[1] * g.grid[2];
  releases.assign(n_blocks, {0, 0});
  fences.assign(n_blocks, 0);
  acquires.assign(n_blocks, 0);
  message[0] = 0;
}

// returns null, or a description of the error
const char* cuda_sim_launch(const Kernel* kernel, GivenLaunch* given) {
  try {
    begin_launch(kernel, *given);
  } catch (const std::bad_alloc&) {
    return "no address space for the marks of every element";
  }
  given->number = launch->stamp;
  if (_setjmp(launcher)) {  // after an error: the next launch creates new stacks
    for (Fiber& f : fibers) f.stack = nullptr;
    current = -1;
    return message;
  }
  const uint32_t *grid = given->grid, n_blocks = releases.size();
  blocks.resize(n_blocks);
  for (uint32_t k = 0; k < n_blocks; k++) blocks[k] = order == 1 ? n_blocks - 1 - k : k;
  if (order == 2) std::shuffle(blocks.begin(), blocks.end(), order_rng);
  for (uint32_t k = 0; k < n_blocks; k++) {
    block_index = blocks[k];
    first_thread = block_index * n_threads + 1;
    cuda_sim_indices.block = {block_index % grid[0], block_index / grid[0] % grid[1],
                              block_index / grid[0] / grid[1]};
    run_block();
  }
  current = -1;
  for (uint32_t i = 0; i < given->n_extents; i++) {
    given->extents[i].read = launch->extents[i].read;
    given->extents[i].written = launch->extents[i].written;
  }
  return nullptr;
}

// -- functions that -fsanitize=thread calls ------------------------------------------------------

#define PC __builtin_return_address(0)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(n)                                                                             \
  void __tsan_read##n(void* p) { access((uintptr_t)p, n, READ, {PC}); }                 \
  void __tsan_write##n(void* p) { access((uintptr_t)p, n, WRITE, {PC}); }                 \
  void __tsan_unaligned_read##n(void* p) { access((uintptr_t)p, n, READ, {PC}); }       \
  void __tsan_unaligned_write##n(void* p) { access((uintptr_t)p, n, WRITE, {PC}); }       \
  void __tsan_volatile_read##n(void* p) { access((uintptr_t)p, n, READ, {PC}); }        \
  void __tsan_volatile_write##n(void* p) { access((uintptr_t)p, n, WRITE, {PC}); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(void* p, size_t n) { access((uintptr_t)p, n, READ, {PC}); }
void __tsan_write_range(void* p, size_t n) { access((uintptr_t)p, n, WRITE, {PC}); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

// -- functions that -fsanitize=alignment,bounds calls --------------------------------------------

struct UbsanSite { const char* file; uint32_t line, column; };
struct UbsanType { uint16_t kind, info; char name[1]; };
struct UbsanMismatch { UbsanSite site; UbsanType* type; unsigned char log_alignment, check; };
struct UbsanBounds { UbsanSite site; UbsanType *array, *index; };
Where at(const UbsanSite& s) { return {nullptr, {s.file, (int)s.line}}; }
void __ubsan_handle_type_mismatch_v1_abort(UbsanMismatch* d, uintptr_t p) {
  if (!p) stop(at(d->site), "null pointer of type %s", d->type->name);
  stop(at(d->site), "misaligned access of type %s at %p, which needs a multiple of %d bytes",
       d->type->name, (void*)p, 1 << d->log_alignment);
}
void __ubsan_handle_out_of_bounds_abort(UbsanBounds* d, uintptr_t i) {
  stop(at(d->site), "index %zd out of bounds of %s", (intptr_t)i, d->array->name);
}
#define ARITHMETIC(name, what)                                                                \
  void __ubsan_handle_##name##_abort(UbsanSite* s, uintptr_t, uintptr_t) { stop(at(*s), what); }
ARITHMETIC(add_overflow, "integer overflow in an addition")
ARITHMETIC(sub_overflow, "integer overflow in a subtraction")
ARITHMETIC(mul_overflow, "integer overflow in a product")
ARITHMETIC(negate_overflow, "integer overflow in a negation")
ARITHMETIC(divrem_overflow, "division by zero")
ARITHMETIC(shift_out_of_bounds, "shift by too much")
}
