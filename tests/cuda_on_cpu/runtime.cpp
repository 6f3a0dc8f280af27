// Fibers, who of them runs next, and where they wait for each other. Never built with -fsanitize: the sanitizers are
// told of every change of stack, and see the kernels alone.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "stacks.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr unsigned kMaxThreads = 1024, kMaxCluster = 16, kWarp = warpSize;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr uint64_t kMaxTurns = 10000;  // of a thread, on average
// On average, drawn for each cluster: turns in a row of threads of one block, turns from one arrival to the next.
constexpr unsigned kStays[] = {64, 1u << 31}, kDelays[] = {1, 16, 1u << 31};
constexpr uint16_t kOpened = 0x2d4b;

struct Call {
  const char* operation;
  Site site;
  unsigned mask;  // of lanes; 0: the block or cluster
};

// Where a cluster, a block, or the lanes of a mask, wait for each other.
struct Meeting {
  Call call;  // of those that wait
  unsigned arrived = 0;
  unsigned round = 0;
  char clocks[2];  // for ThreadSanitizer; in turn, so that who leaves late learns nothing of the next round
};

enum class State { ready, waiting, exited };

struct Fiber {
  Stack stack;
  uint3 index = {};
  State state = State::exited;
  Call call = {};                    // of the last wait
  Meeting* meeting = nullptr;        // that it was at, or
  const Barrier* barrier = nullptr;  // this
  uint64_t given = 0, taken = 0;
  int source = kSum;
  std::vector<std::pair<unsigned, Transfer>> copies;  // on their way, each with the number of its group
  unsigned groups = 0;                                // that are ended
};

struct Block {
  uint3 index = {};
  Meeting meeting;
  std::vector<Fiber*> ready;
  unsigned exited = 0;  // threads
  char* shared = nullptr;
  std::vector<char> statics;  // while another block runs
};

struct Message {
  Transfer transfer;
  Barrier* barrier;
  unsigned rank;  // of the block that both lie in
  Call call;
};

// Of a cluster: fiber i is thread i % size of block i / size.
Fiber fibers[kMaxCluster * kMaxThreads];
Meeting lane_meetings[kMaxCluster * kMaxThreads];  // a mask's meeting is that of its lowest lane
Block blocks[kMaxCluster];
Meeting cluster_meeting;
std::vector<Message> messages;
Fiber* current = nullptr;                     // null outside of a kernel
unsigned cluster = 0, size = 0, running = 0;  // blocks, threads of each, the block that ran last
unsigned stay = 0, delay = 0;
size_t shared_size = 0;
bool hopper = false;

const void* kernel = nullptr;
void (*body)(const void*) = nullptr;
const void* body_context = nullptr;
std::string error;

Stack main_stack;
char begin_clock, end_clock;

uint64_t random_state = 1;

unsigned random_below(unsigned bound) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>((random_state >> 32) * bound >> 32);
}

// --- fibers -------------------------------------------------------------------------------------------------------

unsigned rank_of(const Fiber& fiber) { return static_cast<unsigned>(&fiber - fibers) / size; }
unsigned thread_of(const Fiber& fiber) { return static_cast<unsigned>(&fiber - fibers) % size; }
Block& block_of(const Fiber& fiber) { return blocks[rank_of(fiber)]; }

void make_ready(Fiber& fiber) {
  fiber.state = State::ready;
  block_of(fiber).ready.push_back(&fiber);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  blockIdx = block_of(fiber).index;
  switch_stack(main_stack, fiber.stack);
  current = nullptr;
}

void suspend() { switch_stack(current->stack, main_stack); }

// A fiber outlives its thread and runs one of the next block.
void run_fiber() {
  finish_first_switch(main_stack);
  for (;;) {
    acquire(&begin_clock);
    body(body_context);
    release(&end_clock);
    current->state = State::exited;
    ++block_of(*current).exited;
    suspend();
  }
}

// Forgets fibers that will never run on.
void abandon_fibers() {
  for (Fiber& fiber : fibers) {
    if (fiber.stack.pointer == nullptr) continue;
    abandon(fiber.stack);
    if (fiber.meeting != nullptr) acquire(&fiber.meeting->clocks[0]), acquire(&fiber.meeting->clocks[1]);
  }
}

// --- errors -------------------------------------------------------------------------------------------------------

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

// From the symbol table, by binutils, which a compiler brings along.
std::string kernel_name() {
  Dl_info info;
  char line[1024] = "??";
  if (dladdr(kernel, &info) == 0) return line;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  FILE* pipe = popen(text("addr2line -Cfse '%s' %#zx 2>/dev/null", info.dli_fname, offset).c_str(), "r");
  if (pipe == nullptr) return line;
  if (std::fgets(line, sizeof line, pipe) == nullptr) line[0] = 0;
  pclose(pipe);
  return std::string(line).substr(0, std::strcspn(line, "\n"));
}

std::string description(const Call& call) {
  const std::string mask = call.mask == 0 ? "" : text(", mask 0x%08x", call.mask);
  return text("%s at %s:%d", call.operation, call.site.file, call.site.line) + mask;
}

std::string text_of(uint3 block) { return text("block (%u, %u, %u)", block.x, block.y, block.z); }

// What each thread of a block does, threads that do the same together.
std::string whereabouts(unsigned rank) {
  std::map<std::string, std::vector<unsigned>> threads;
  for (unsigned i = 0; i < size; ++i) {
    const Fiber& fiber = fibers[rank * size + i];
    std::string doing = &fiber == current ? "failed" : "are ready to run";
    if (fiber.state == State::exited) doing = "have exited";
    if (fiber.state == State::waiting) doing = "wait in " + description(fiber.call);
    threads[doing].push_back(i);
  }
  std::string lines = cluster > 1 ? "\n " + text_of(blocks[rank].index) : "";
  for (const auto& [doing, who] : threads)
    lines += text("\n  %zu threads (%u to %u) ", who.size(), who.front(), who.back()) + doing;
  return lines;
}

void set_error(const std::string& what) {
  error = kernel_name() + ", " + text_of(blockIdx) + what;
  for (unsigned rank = 0; rank < cluster; ++rank) error += whereabouts(rank);
}

// --- meetings -------------------------------------------------------------------------------------------------------

// Owns nothing when it suspends: no destructor of this thread will run.
[[noreturn]] void fail(const Call& call, const char* why) {
  set_error(text(", thread %u: ", thread_of(*current)) + description(call) + ": " + why);
  release(&end_clock);
  suspend();
  std::abort();  // not reached: a launch that failed resumes no thread
}

bool same(const Call& a, const Call& b) {
  return a.mask == b.mask && a.site.line == b.site.line && std::strcmp(a.site.file, b.site.file) == 0;
}

// The calling thread waits until `expected` of the threads from `first` to `last` have come.
uint64_t meet(Meeting& meeting, const Call& call, unsigned first, unsigned last, unsigned expected) {
  Fiber& me = *current;
  if (meeting.arrived == 0) {
    meeting.call = call;
    ++meeting.round;
  } else if (!same(meeting.call, call)) {
    fail(call, "other threads wait elsewhere or with another mask");
  }
  char* clock = &meeting.clocks[meeting.round % 2];
  release(clock);
  me.call = call, me.meeting = &meeting, me.state = State::waiting;
  if (++meeting.arrived == expected) {
    uint64_t sum = 0;
    const auto each = [&](auto visit) {
      for (unsigned i = first; i < last; ++i)
        if (fibers[i].state == State::waiting && fibers[i].meeting == &meeting) visit(fibers[i]);
    };
    each([&](Fiber& fiber) { sum += fiber.given; });
    each([&](Fiber& fiber) { fiber.taken = fiber.source == kSum ? sum : fibers[first + fiber.source].given; });
    each(make_ready);
    meeting.arrived = 0;
  }
  suspend();
  acquire(clock);
  return me.taken;
}

// --- what arrives later -------------------------------------------------------------------------------------------

// Not by memcpy, which sanitizers watch: what they are to see, depart() does.
void arrive(const Transfer& transfer) {
  auto* to = static_cast<volatile unsigned*>(transfer.to);
  for (const unsigned word : transfer.words) *to++ = word;
}

// For ThreadSanitizer; in turn, as those of a meeting.
char* clock_of(Barrier& barrier, int phase) { return reinterpret_cast<char*>(&barrier) + phase; }

void end_phase_if_complete(Barrier& barrier, unsigned rank) {
  if (barrier.arrived == 0 || barrier.missing != 0) return;
  barrier.arrived = 0;
  barrier.phase ^= 1;
  for (unsigned i = rank * size; i < (rank + 1) * size; ++i)
    if (fibers[i].state == State::waiting && fibers[i].barrier == &barrier)
      fibers[i].barrier = nullptr, make_ready(fibers[i]);
}

void deliver_any() {
  const Unwatched unwatched;
  std::swap(messages[random_below(static_cast<unsigned>(messages.size()))], messages.back());
  const Message message = std::move(messages.back());
  messages.pop_back();
  if (blocks[message.rank].exited == size) {
    blockIdx = blocks[message.rank].index;
    return set_error(": " + description(message.call) + " writes to a block that has exited");
  }
  arrive(message.transfer);
  message.barrier->missing -= static_cast<int>(message.transfer.words.size() * sizeof(unsigned));
  end_phase_if_complete(*message.barrier, message.rank);
}

// --- clusters -----------------------------------------------------------------------------------------------------

// The variables that are declared __shared__, which kernels look for in one place: there lie those of the block that
// runs.
char* statics = nullptr;
size_t statics_size = 0;
thread_local char among_statics;

int find_statics(dl_phdr_info* info, size_t, void*) {
  char* const begin = static_cast<char*>(info->dlpi_tls_data);
  for (unsigned i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_TLS && begin <= &among_statics && &among_statics < begin + header.p_memsz)
      statics = begin, statics_size = header.p_memsz;
  }
  return 0;
}

void enter(unsigned rank) {
  std::copy_n(statics, statics_size, blocks[running].statics.begin());
  running = rank;
  std::copy_n(blocks[rank].statics.begin(), statics_size, statics);
}

void begin_block(unsigned rank, uint3 index) {
  Block& block = blocks[rank];
  block.index = index;
  block.meeting.arrived = 0;
  block.exited = 0;
  block.ready.clear();
  block.ready.reserve(size);  // here, not by a thread of the kernel
  std::memset(block.shared, 0xff, shared_size);
  block.statics.assign(statics_size, '\xff');
  for (unsigned i = 0; i < size; ++i) {
    Fiber& fiber = fibers[rank * size + i];
    if (fiber.stack.pointer == nullptr) begin(fiber.stack, run_fiber, (&fiber - fibers) % 64);
    const unsigned row = i / blockDim.x;
    fiber.index = {i % blockDim.x, row % blockDim.y, row / blockDim.y};
    fiber.barrier = nullptr;
    fiber.copies.clear();
    lane_meetings[rank * size + i].arrived = 0;
    make_ready(fiber);
  }
}

// One that is ready, mostly of the block that ran last; null: there is none.
Fiber* draw_fiber() {
  if (blocks[running].ready.empty() || random_below(stay) == 0) {
    unsigned rank = random_below(cluster);
    for (unsigned i = 0; i < cluster && blocks[rank].ready.empty(); ++i) rank = (rank + 1) % cluster;
    if (rank != running) enter(rank);
  }
  std::vector<Fiber*>& ready = blocks[running].ready;
  if (ready.empty()) return nullptr;
  std::swap(ready[random_below(static_cast<unsigned>(ready.size()))], ready.back());
  Fiber* const fiber = ready.back();
  ready.pop_back();
  return fiber;
}

void run_threads() {
  uint64_t turns = kMaxTurns * size * cluster;
  while (error.empty()) {
    Fiber* const fiber = draw_fiber();
    if (fiber == nullptr && messages.empty()) break;
    if (fiber != nullptr) resume(*fiber);
    if (error.empty() && !messages.empty() && (fiber == nullptr || random_below(delay) == 0)) deliver_any();
    if (turns-- == 0) return set_error(": endless loop");
  }
  const auto alive = [](const Block& block) { return block.exited < size; };
  if (error.empty() && std::any_of(blocks, blocks + cluster, alive)) set_error(": deadlock");
}

// Block `first` of the grid and its neighbours.
void run_cluster(uint64_t first) {
  messages.clear();
  cluster_meeting.arrived = 0;
  for (unsigned rank = 0; rank < cluster; ++rank) {
    const uint64_t i = first + rank;
    begin_block(rank, {static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
                       static_cast<unsigned>(i / gridDim.x / gridDim.y)});
  }
  running = 0;
  std::copy_n(blocks[0].statics.begin(), statics_size, statics);
  stay = kStays[random_below(2)], delay = kDelays[random_below(3)];
  release(&begin_clock);
  run_threads();
  if (!error.empty()) abandon_fibers();
  acquire(&end_clock);
}

}  // namespace

bool is_hopper() { return hopper; }
void* shared_memory() { return block_of(*current).shared; }
unsigned cluster_size() { return cluster; }
unsigned cluster_rank() { return rank_of(*current); }

void fail(const char* operation, Site site, const char* why) { fail({operation, site, 0}, why); }

void meet_block(const char* operation, Site site) {
  const unsigned first = rank_of(*current) * size;
  meet(block_of(*current).meeting, {operation, site, 0}, first, first + size, size);
}

void meet_cluster(const char* operation, Site site) {
  meet(cluster_meeting, {operation, site, 0}, 0, cluster * size, cluster * size);
}

uint64_t meet_lanes(const char* operation, unsigned mask, uint64_t value, int source, Site site) {
  const Call call = {operation, site, mask};
  const unsigned id = thread_of(*current), begin = static_cast<unsigned>(current - fibers) - id;
  const unsigned warp = begin + id / kWarp * kWarp;
  if ((mask >> id % kWarp & 1) == 0) fail(call, "the mask leaves out the calling lane");
  if (source != kSum && (mask >> source & 1) == 0) fail(call, "the mask leaves out the lane that is read");
  current->given = value;
  current->source = source;
  Meeting& meeting = lane_meetings[warp + static_cast<unsigned>(__builtin_ctz(mask))];
  const unsigned lanes = static_cast<unsigned>(__builtin_popcount(mask));
  return meet(meeting, call, warp, std::min(warp + kWarp, begin + size), lanes);
}

void* in_block(unsigned rank, void* address, size_t bytes, const char* operation, Site site) {
  const auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared_memory());
  const Call call = {operation, site, 0};
  if (offset > shared_size || bytes > shared_size - offset) fail(call, "this is not the block's dynamic shared memory");
  if (rank >= cluster) fail(call, "the cluster has no such block");
  if (blocks[rank].exited == size) fail(call, "the block has exited");
  return blocks[rank].shared + offset;
}

void copy_until_waited_for(Transfer transfer) { current->copies.emplace_back(current->groups, std::move(transfer)); }

void end_group_of_copies() { ++current->groups; }

void wait_for_groups(unsigned pending) {
  auto& copies = current->copies;
  const auto late = std::find_if(copies.begin(), copies.end(),
                                 [&](const auto& copy) { return current->groups - copy.first <= pending; });
  std::for_each(copies.begin(), late, [](const auto& copy) { arrive(copy.second); });
  copies.erase(copies.begin(), late);
}

void wait_for_copies() {
  end_group_of_copies();
  wait_for_groups(0);
}

void open(Barrier& barrier) { barrier = {0, 0, 0, kOpened}; }

void check_open(const char* operation, const Barrier& barrier, Site site) {
  if (barrier.opened != kOpened) fail(operation, site, "the mailbox is not open");
}

void expect(const char* operation, Barrier& barrier, int bytes, Site site) {
  check_open(operation, barrier, site);
  if (barrier.arrived != 0) fail(operation, site, "this phase is announced already");
  release(clock_of(barrier, barrier.phase));
  barrier.missing += bytes;
  barrier.arrived = 1;
  end_phase_if_complete(barrier, rank_of(*current));
}

void post(const char* operation, Transfer transfer, Barrier& barrier, unsigned rank, Site site) {
  release(clock_of(barrier, barrier.phase));
  const Unwatched unwatched;
  messages.push_back({std::move(transfer), &barrier, rank, {operation, site, 0}});
}

// Looks again when it goes on: a phase that ended meanwhile would be missed on a GPU too.
void wait(const char* operation, Barrier& barrier, int phase, Site site) {
  check_open(operation, barrier, site);
  Fiber& me = *current;
  while (barrier.phase == phase) {
    me.call = {operation, site, 0}, me.meeting = nullptr, me.barrier = &barrier, me.state = State::waiting;
    release(&end_clock);  // if it never goes on
    suspend();
  }
  acquire(clock_of(barrier, phase));
}

int run(const void* kernel_, dim3 grid, dim3 block, unsigned cluster_, size_t shared_bytes, void (*body_)(const void*),
        const void* context) {
  error.clear();
  kernel = kernel_, body = body_, body_context = context;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, count = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || count == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > kMaxSharedBytes || cluster_ == 0 || cluster_ > (hopper ? kMaxCluster : 1) ||
      grid.x % cluster_ != 0) {
    error = kernel_name() + text(": %zu blocks of %zu threads with %zu bytes, %u a cluster, are no launch", count,
                                 threads, shared_bytes, cluster_);
    return cudaErrorInvalidConfiguration;
  }

  gridDim = grid, blockDim = block;
  cluster = cluster_, size = static_cast<unsigned>(threads), shared_size = shared_bytes;
  if (!is_sanitized()) dl_iterate_phdr(find_statics, nullptr);
  adopt(main_stack);
  for (unsigned rank = 0; rank < cluster; ++rank)  // to the byte, so that AddressSanitizer sees overruns
    if (posix_memalign(reinterpret_cast<void**>(&blocks[rank].shared), 128, shared_bytes) != 0) std::abort();
  std::vector<uint64_t> order(count / cluster);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i * cluster;
  std::shuffle(order.begin(), order.end(), std::minstd_rand(random_below(1u << 30)));
  for (const uint64_t first : order) {
    run_cluster(first);
    if (!error.empty()) break;
  }
  for (unsigned rank = 0; rank < cluster; ++rank) std::free(blocks[rank].shared);
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

const char* cuda_on_cpu_error() { return cuda_on_cpu::error.c_str(); }

void cuda_on_cpu_hopper(int64_t yes) { cuda_on_cpu::hopper = yes != 0; }

void cuda_on_cpu_seed(uint64_t seed) { cuda_on_cpu::random_state = seed * 2 + 1; }
