// Which instruction set, how many threads, which rows on which thread.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastpref::cpu {

namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#ifdef FASTPREF_X86
  __builtin_cpu_init();
  // What CMakeLists.txt lets the compiler use; the operating system's part of it is in the answer. F16C, which older
  // compilers cannot ask for, came before AVX2 in every line of processors.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512bf16);
  if (avx512) found.push_back(&kernels_avx512);
  if (avx2) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_portable);
  return found;
}

const std::vector<const Kernels*>& here() {
  static const std::vector<const Kernels*> found = runnable();
  return found;
}

// torch's OpenMP, whichever it is, if torch is loaded: found in the running process, because this module links
// neither. An OpenMP of our own, or threads of our own, would meet torch's worker threads, which spin for tens of
// milliseconds after a GEMM and hold their cores. A sweep in place right after torch.mm, 2 cores, ms (one thread /
// std::thread started for the call / a waiting pool / torch's workers): fp32 64 x 32000 0.69 / 0.86 / 0.75 / 0.40;
// fp32 512 x 32000 5.2 / 5.4 / 5.3 / 2.8; bf16 512 x 32000 4.6 / 4.7 / 4.6 / 2.5; fp32 2048 x 32000 22 / 21 / 24 /
// 12. GNU's, Intel's and LLVM's runtimes all have this entry point.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Parallel torch_parallel() {
#ifdef __linux__
  static const Parallel found = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel")) : nullptr;
  }();
  return found;
#else
  return nullptr;
#endif
}

template <class Work>
void on_threads(int64_t threads, Work& work) {
  if (threads <= 1) return work();
  if (const Parallel parallel = torch_parallel())
    return parallel([](void* w) { (*static_cast<Work*>(w))(); }, &work, unsigned(threads), 0);
  std::vector<std::thread> others;
  try {
    while (int64_t(others.size()) < threads - 1) others.emplace_back([&work] { work(); });
  } catch (const std::system_error&) {
    // No more threads to be had: those that are there do all the rows.
  }
  work();
  for (std::thread& t : others) t.join();
}

// `count` rows or columns of `each` numbers, shared out.
template <class Work>
void over(int64_t count, int64_t each, int threads, const Work& some) {
  // A thread takes 64k numbers at a time, some 15 us of a sweep: so one that the system holds up delays nobody, and a
  // tile too small to share stays on this thread.
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(1, each));
  const int64_t chunks = (count + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      some(c * grain, std::min(count, (c + 1) * grain));
  };
  on_threads(chunks > 1 ? threads : 1, work);
}

template <class Work>
void over_rows(const Tile& tile, int threads, const Work& rows) {
  over(tile.rows, tile.cols, threads, rows);
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* k : here()) names.emplace_back(k->name);
  return names;
}

const Kernels& kernels(const std::string& isa) {
  const char* forced = std::getenv("FASTPREF_ISA");
  const std::string wanted = !isa.empty() ? isa : forced ? forced : "";
  if (wanted.empty()) return *here().front();
  std::string names;
  for (const Kernels* k : here()) {
    if (k->name == wanted) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::invalid_argument("FASTPREF_ISA is '" + wanted + "'; this machine runs " + names);
}

void residual(const Tile& tile, const Out& out, const Stats& stats, int threads) {
  const Kernels& k = kernels();
  over_rows(tile, threads, [&](int64_t begin, int64_t end) { k.residual(tile, out, stats, begin, end); });
}

void fold(const Tile& tile, const FoldState& state, int threads) {
  const Kernels& k = kernels();
  over_rows(tile, threads, [&](int64_t begin, int64_t end) { k.fold(tile, state, begin, end); });
}

void residual_given_lse(const Tile& tile, const Given& given, const Out& out, int threads) {
  const Kernels& k = kernels();
  over_rows(tile, threads, [&](int64_t begin, int64_t end) { k.residual_given_lse(tile, given, out, begin, end); });
}

void gradient_given_lse(const Tile& tile, const Given& given, const Out& out, int threads) {
  const Kernels& k = kernels();
  over_rows(tile, threads, [&](int64_t begin, int64_t end) { k.gradient_given_lse(tile, given, out, begin, end); });
}

void peaks(const Residuals& r, const Peaks& out, int threads) {
  const Kernels& k = kernels();
  // Pieces of 1024 columns, however many rows: less would read less than a line's neighbours at a time.
  over((r.cols + 1023) / 1024, 1024 * std::max<int64_t>(r.rows, 1), threads,
       [&](int64_t begin, int64_t end) { k.peaks(r, out, begin * 1024, std::min(r.cols, end * 1024)); });
}

void split(const Residuals& r, const int32_t* columns, int64_t count, const Out& out, float* rest, int threads) {
  const Kernels& k = kernels();
  std::vector<uint16_t> mask((r.cols + 15) / 16);
  for (int64_t i = 0; i < count; ++i) mask[columns[i] / 16] |= uint16_t(1u << columns[i] % 16);
  const Active active{columns, count, mask.data()};
  over(r.rows, r.cols, threads, [&](int64_t begin, int64_t end) { k.split(r, active, out, rest, begin, end); });
}

void add_rows(float* total, const Out& part, const int32_t* columns, int64_t count, int64_t width, int threads) {
  const Kernels& k = kernels();
  over(count, width, threads,
       [&](int64_t begin, int64_t end) { k.add_rows(total, part, columns, width, begin, end); });
}

bool advise_huge(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + bytes) / page * page;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)address, (void)bytes;
  return false;
#endif
}

}  // namespace fastpref::cpu
