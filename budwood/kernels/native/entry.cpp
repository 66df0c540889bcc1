// The C interface: chooses the path for the CPU, converts the activations to its dtype, splits the rows of
// the matrices among threads.
#include "kernels.h"
#ifdef BUDWOOD_X86
#include "tiles.h"
#endif

#include <algorithm>
#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace budwood {
namespace {

// Kernels, as the caller numbers them.
enum Way : int32_t { BY_ROWS = 0, AS_FEW = 1, AS_SPARSE = 2, AS_PANELS = 3 };

constexpr size_t HUGE_PAGE = 2 << 20;

struct Room {
    void* data = nullptr;
    size_t bytes = 0;
    ~Room() { release(); }
    void release() {
        std::free(data);
        data = nullptr, bytes = 0;
    }
};

thread_local Room rooms[8];  // by slot of `scratch`

const Path* best() {
#ifdef BUDWOOD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512dq")) {
#ifdef BUDWOOD_AMX
        if (amx_allowed()) return &amx;
#endif
        return &avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return &avx2;
#endif
    return &scalar;
}

const Path* path = best();

// The first row after a share `part / parts` of the values: threads get the same number of bytes.
int64_t border(const Matrix& a, int part, int parts) {
    if (part == 0) return 0;
    if (part == parts) return a.out;
    const int64_t wanted = (int64_t(a.starts[a.out]) + a.out) * part / parts;
    int64_t low = 0, high = a.out;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        int64_t bytes = int64_t(a.starts[middle]) + middle;  // + middle: rows without values take time too
        bytes < wanted ? low = middle + 1 : high = middle;
    }
    return low;
}

// `count` elements of x from `index` on as float32 or bfloat16, zeros behind them up to `room`.
void bring(const void* x, int32_t type, int64_t index, int64_t count, int64_t room, bool bfloat16, void* to) {
    if (bfloat16) {
        uint16_t* into = static_cast<uint16_t*>(to);
        std::memcpy(into, static_cast<const uint16_t*>(x) + index, size_t(count) * 2);
        std::memset(into + count, 0, size_t(room - count) * 2);
        return;
    }
    float* into = static_cast<float*>(to);
    if (type == FLOAT32) {
        std::memcpy(into, static_cast<const float*>(x) + index, size_t(count) * 4);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(x) + index;
        if (type == BFLOAT16) {
            for (int64_t i = 0; i < count; ++i) into[i] = from_bfloat16(from[i]);
        } else {
            for (int64_t i = 0; i < count; ++i) into[i] = from_float16(from[i]);
        }
    }
    std::memset(into + count, 0, size_t(room - count) * 4);
}

void* element(const Input& input, int64_t index) {
    return static_cast<char*>(const_cast<void*>(input.data)) + index * (input.bfloat16 || input.scales ? 2 : 4);
}

// Rows [first, last) of x [rows, in], one after the other.
void widen(const void* x, int32_t type, int64_t in, const Input& to, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        bring(x, type, row * in, in, to.stride, to.bfloat16, element(to, row * to.stride));
    }
}

// Columns [first, last) LANEs of x [rows, in], in the layout for few rows.
void interleave(const void* x, int32_t type, int64_t in, const Input& to, int64_t first, int64_t last) {
    for (int64_t lane = first; lane < last; ++lane) {
        const int64_t column = lane * LANE, left = in - column, count = left < 0 ? 0 : left < LANE ? left : LANE;
        for (int64_t row = 0; row < to.rows; ++row) {
            bring(x, type, row * in + column, count, LANE, to.bfloat16, element(to, place(to.rows, row, column)));
        }
    }
}

int64_t width(int32_t type) { return type == FLOAT32 ? 4 : type == INT8 || type == INT4 ? 1 : 2; }

constexpr int64_t NEAR = 256 << 10;  // bytes of a matrix that stay in the L2 cache
constexpr int64_t FEWEST = 64;       // rows: smaller chunks are not worth the overhead

// How many rows of the matrix stay in the L2 cache.
int64_t rows_near(const Matrix& a) {
    const int64_t rows = NEAR / (a.count * width(a.type) / a.out + a.stride);
    return rows < FEWEST ? FEWEST : rows;
}

struct Team {
    int me, all;
};

Team team() {  // which thread this is, of how many
#ifdef _OPENMP
    return {omp_get_thread_num(), omp_get_num_threads()};
#else
    return {0, 1};
#endif
}

int64_t share(int64_t whole, int part, int parts) { return whole * part / parts; }

// Where x is copied to; null if it is used in place.
Input input_for(const void* x, int32_t type, int64_t rows, int64_t in, bool bfloat16, bool in_order) {
    Input input = {x, rows, (in + 63) / 64 * 64, bfloat16, nullptr};
    const bool as_it_is = input.stride == in && type == (bfloat16 ? BFLOAT16 : FLOAT32) && (in_order || rows == 1);
    if (!as_it_is) input.data = scratch(4, size_t(rows * input.stride) * (bfloat16 ? 2 : 4));
    return input;
}

Input integers_for(int64_t rows, int64_t in, bool twice) {
    if (twice) rows *= 2;
    const int64_t segments = (in + SEGMENT - 1) / SEGMENT;
    float* scales = static_cast<float*>(scratch(7, size_t(rows * segments) * sizeof(float)));
    return {scratch(4, size_t(rows * segments * SEGMENT) * sizeof(int16_t)), rows, segments * SEGMENT, false, scales, twice};
}

// |x| at `index`; of float16 finite too where x is not, from 65536 on.
template <int TYPE>
inline float magnitude(const void* x, int64_t index) {
    uint32_t bits;
    if (TYPE == FLOAT32) {
        bits = static_cast<const uint32_t*>(x)[index] & 0x7fffffffu;
    } else {
        bits = (static_cast<const uint16_t*>(x)[index] & 0x7fffu) << (TYPE == BFLOAT16 ? 16 : 13);
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return TYPE == FLOAT16 ? value * 0x1p112f : value;
}

// How x is rounded to 16-bit integers. Each is off by up to 1/65534 of the largest magnitude of its SEGMENT.
enum Rounding { ONCE, TWICE, NEVER };

constexpr double PEAK = 8;  // the largest magnitude of a SEGMENT over a typical one that ONCE is used for
constexpr int SETS = 16;    // of columns of a SEGMENT: some large values are in some of them only

// A typical magnitude: the lower quartile of the means of those sets that are not zero.
double typical(const float* sums, int64_t count) {
    double means[SETS];
    int found = 0;
    for (int k = 0; k < SETS; ++k) {
        if (sums[k] > 0) means[found++] = double(sums[k]) / double((count + SETS - 1 - k) / SETS);
    }
    std::sort(means, means + found);
    return found ? means[found / 4] : 0;
}

// ONCE where the largest of no SEGMENT is far above a typical one; TWICE where what is left has to be kept too; NEVER where that
// is not enough, and for values that are not finite or very small.
template <int TYPE>
Rounding rounding_of(const void* x, int64_t rows, int64_t in) {
    Rounding found = ONCE;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < in; column += SEGMENT) {
            const int64_t count = in - column < SEGMENT ? in - column : SEGMENT, first = row * in + column;
            float sums[SETS] = {}, largest[SETS] = {};
            const auto add = [&](int64_t i, int k) {
                const float value = magnitude<TYPE>(x, first + i + k);
                sums[k] += value;
                largest[k] = largest[k] < value ? value : largest[k];
            };
            int64_t i = 0;
            for (; i + SETS <= count; i += SETS) {
                for (int k = 0; k < SETS; ++k) add(i, k);
            }
            for (int k = 0; i + k < count; ++k) add(i, k);
            double sum = 0, most = 0;
            for (int k = 0; k < SETS; ++k) sum += sums[k], most = most < largest[k] ? largest[k] : most;
            if (sum == 0) continue;
            const double peak = most / typical(sums, count);
            const bool usable = sum <= 3e38 && most >= 0x1p-90 && !(TYPE == FLOAT16 && most >= 65536);
            if (!usable || !(peak <= PEAK * FINER)) return NEVER;
            if (peak > PEAK) found = TWICE;
        }
    }
    return found;
}

Rounding rounding_for(const void* x, int32_t type, int64_t rows, int64_t in) {
    return type == FLOAT32    ? rounding_of<FLOAT32>(x, rows, in)
           : type == BFLOAT16 ? rounding_of<BFLOAT16>(x, rows, in)
                              : rounding_of<FLOAT16>(x, rows, in);
}

// Rows [row, row + count) of an input with `at_once` rows per group.
Input some_of(const Input& input, int64_t row, int64_t count) {
    Input some = input;
    some.rows = count;
    some.data = element(input, row * input.stride);
    if (input.scales) some.scales = input.scales + row * (input.stride / SEGMENT);
    return some;
}

// As many threads as have work: a start and a join take as long as reading so many bytes of tiles with one row of x.
int32_t threads_for(const Matrix* matrices, int32_t count, int64_t rows, int32_t threads) {
    constexpr int64_t WORTH = 64 << 10;
    int64_t bytes = 0;
    for (int32_t i = 0; i < count; ++i) bytes += path->tiled->bytes(matrices[i]);
    const int64_t most = bytes * (rows + 1) / 2 / WORTH;
    return most < 1 ? 1 : most < threads ? int32_t(most) : threads;
}

// Whether the path has a kernel for a matrix of INT4 values in tiles: for few rows only where no weight was dropped; SHORTS
// only where it packs them itself.
bool tiles_take([[maybe_unused]] const Matrix& a, [[maybe_unused]] bool few) {
#ifdef BUDWOOD_X86
    const tiles::Head& h = tiles::head_of(a);
    return few ? path->tiled->shorts || !h.shorts : h.coding != DENSE;
#else
    return false;
#endif
}

// Products with matrices in tiles, FEW rows of x at a time.
void few_tiled(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows, const Output* outputs,
               int32_t threads) {
    threads = threads_for(matrices, count, rows, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const auto [me, all] = team();
        Output* shifted = static_cast<Output*>(scratch(7, size_t(count) * sizeof(Output)));
        for (int64_t row = 0; row < rows; row += FEW) {
            for (int32_t i = 0; i < count; ++i) {
                shifted[i] = outputs[i];
                shifted[i].y = static_cast<char*>(outputs[i].y) + row * outputs[i].stride * width(outputs[i].type);
            }
            const char* from = static_cast<const char*>(x) + row * matrices[0].in * width(type);
            path->tiled->few(matrices, count, from, type, rows - row < FEW ? rows - row : FEW, shifted, me, all);
        }
    }
}

}  // namespace

void* scratch(int slot, size_t bytes) {
    Room& room = rooms[slot];
#ifdef BUDWOOD_EXACT_ROOM  // so that AddressSanitizer sees every access beyond it
    std::free(room.data);
    room.bytes = bytes;
    if (posix_memalign(&room.data, 64, bytes)) std::abort();
    return room.data;
#endif
    if (room.bytes < bytes) {
        std::free(room.data);
        const size_t page = bytes < HUGE_PAGE ? 4096 : HUGE_PAGE;
        room.bytes = (bytes + bytes / 2 + page - 1) / page * page;
        room.data = std::aligned_alloc(page, room.bytes);
        if (!room.data) std::abort();
#ifdef MADV_HUGEPAGE
        if (page == HUGE_PAGE) madvise(room.data, room.bytes, MADV_HUGEPAGE);  // a table is read at random
#endif
    }
    return room.data;
}

}  // namespace budwood

using namespace budwood;

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Changes with every change of the functions below or of `Matrix`.
EXPORT int32_t budwood_interface() { return 9; }

// Frees what the products of these threads have kept for the next ones.
EXPORT void budwood_release(int32_t threads) {
#pragma omp parallel num_threads(threads)
    for (Room& room : rooms) room.release();
#ifdef BUDWOOD_X86
    tiles::forget();
#endif
}

EXPORT const char* budwood_path() { return path->name; }

// Sets the named path, or the best for "auto"; 0 where this CPU cannot run it.
EXPORT int32_t budwood_choose(const char* name) {
    const Path* widest = best();
    if (!std::strcmp(name, "auto")) return path = widest, 1;
    if (!std::strcmp(name, scalar.name)) return path = &scalar, 1;
#ifdef BUDWOOD_X86
    if (!std::strcmp(name, avx2.name) && widest != &scalar) return path = &avx2, 1;
    if (!std::strcmp(name, avx512.name) && widest != &scalar && widest != &avx2) return path = &avx512, 1;
    if (!std::strcmp(name, widest->name)) return path = widest, 1;
#endif
    return 0;
}

// Whether the path has this kernel.
EXPORT int32_t budwood_has(int32_t way) { return way == AS_FEW || (way == AS_SPARSE ? path->sparse : path->panels) != nullptr; }
EXPORT int32_t budwood_has_dense() { return path->dense != nullptr; }

// Counts the values of every row: starts [out + 1]. Returns 0 where they are too many for 32 bits.
EXPORT int32_t budwood_starts(const uint8_t* places, int64_t out, int64_t in, int64_t stride, int32_t coding, int32_t* starts) {
    Matrix a = {};
    a.places = places, a.in = in, a.out = out, a.stride = stride, a.coding = coding;
    int64_t total = 0;
    for (int64_t row = 0; row < out; ++row) {
        starts[row] = int32_t(total);
        if (coding == NIBBLES) {
            total += in / 2;
        } else {
            int64_t word = 0;
            for (; 64 * word + 64 <= in; ++word) {
                uint64_t bits;
                std::memcpy(&bits, places + row * stride + 8 * word, 8);
                total += __builtin_popcountll(bits);
            }
            for (int64_t half = 2 * word; 32 * half < in; ++half) total += __builtin_popcount(mask_word(a, row, half));
        }
        if (total > INT32_MAX - 64) return 0;
    }
    starts[out] = int32_t(total);
    return 1;
}

// Whether all that kernels index by stays inside the matrix and agrees with itself: columns beyond the last are unset, two
// places of a group differ and rise, recovered weights rise within their segment and are outside the 2:4 part, and scales are
// positive and finite. The sizes of the tensors and the sums of the counts are checked before.
EXPORT int32_t budwood_sound(const Matrix* matrix) {
    const Matrix& a = *matrix;
    const int64_t segments = segments_of(a), bytes = (a.in + 7) / 8;
    const int tail = int(a.in % 8);
    const auto rises = [](int nibble) { return (nibble & 3) < nibble >> 2; };
    bool good[256], sound = true;
    for (int byte = 0; byte < 256; ++byte) good[byte] = a.coding == BITMASK || (rises(byte & 15) && rises(byte >> 4));
#pragma omp parallel for reduction(&& : sound)
    for (int64_t row = 0; row < a.out; ++row) {
        const uint8_t* places = a.places + row * a.stride;
        bool fine = true;
        for (int64_t byte = 0; byte < (tail ? bytes - 1 : bytes); ++byte) fine = fine & good[places[byte]];
        if (tail) {  // for 2:4 there is one group, and no second one
            const int last = places[bytes - 1];
            fine = fine && (a.coding == BITMASK ? last >> tail == 0 : last < 16 && rises(last));
        }
        for (int64_t segment = 0; a.type == INT8 && segment < segments; ++segment) {
            const float scale = a.scales[row * segments + segment];
            fine = fine && scale > 0 && scale <= 3.4028234e38f;
        }
        int64_t next = a.more_starts ? a.more_starts[row] : 0, end = a.more_starts ? a.more_starts[row + 1] : 0;
        for (int64_t segment = 0; a.more_starts && segment < segments; ++segment) {
            int before = -1;
            for (int n = a.more_counts[row * segments + segment]; fine && n; --n, ++next) {
                if (next >= end) {
                    fine = false;
                    break;
                }
                const int64_t inside = a.more_columns[next], column = segment * SEGMENT + inside;
                fine = inside > before && column < a.in && !(mask_word(a, row, column / 32) >> column % 32 & 1);
                before = int(inside);
            }
        }
        sound = sound && fine;
    }
    return sound;
}

// Whether the path multiplies matrices in tiles: 0 none, 1 those with INT4 values, 2 all.
EXPORT int32_t budwood_has_tiles() { return path->prefers_tiles ? 2 : path->tiled != nullptr; }

#ifdef BUDWOOD_X86
// tiles::plan, pack and unpack; only for a path that has tiles.
EXPORT int64_t budwood_tiles_plan(const Matrix* matrix, int32_t* kind, int32_t* entries) {
    return tiles::plan(*matrix, path->tiled && path->tiled->shorts, *kind, entries);
}
EXPORT int32_t budwood_tiles_pack(const Matrix* matrix, int32_t kind, const int32_t* entries, void* to) {
    return tiles::pack(*matrix, kind, entries, to);
}
EXPORT void budwood_tiles_unpack(const void* from, void* values, uint8_t* places, float* scales, uint8_t* more_counts,
                                 uint8_t* more_columns, void* more_values) {
    tiles::unpack(from, values, places, scales, more_counts, more_columns, more_values);
}
#endif

// y = x W^T + bias for several matrices that share x [rows, in] of `type`. Returns 0 where the path has no such kernel.
EXPORT int32_t budwood_linear(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t rows,
                       const Output* outputs, int32_t threads, int32_t way) {
    const int64_t in = matrices[0].in;
    bool bfloat16 = path->multiplies_bfloat16 && type == BFLOAT16, panels = bfloat16 && path->panels;
    int32_t int8 = 0, tiled = 0;
    for (int32_t i = 0; i < count; ++i) {
        tiled += matrices[i].coding == TILES && matrices[i].type == matrices[0].type;
        bfloat16 = bfloat16 && matrices[i].type == BFLOAT16;
        panels = panels && (matrices[i].type == BFLOAT16 || matrices[i].type == INT8);
        int8 += matrices[i].type == INT8;
    }
    if (way == BY_ROWS) way = rows <= FEW ? AS_FEW : panels ? AS_PANELS : path->sparse ? AS_SPARSE : AS_FEW;
    if (way == AS_PANELS && !panels) return 0;
    if (way == AS_SPARSE && !path->sparse) return 0;
    if (tiled && (tiled < count || !path->tiled)) return 0;
    for (int32_t i = 0; i < count; ++i) {
        if (matrices[i].type == INT4 && (!tiled || !tiles_take(matrices[i], way == AS_FEW))) return 0;
    }
    if (tiled && way == AS_FEW) return few_tiled(matrices, count, x, type, rows, outputs, threads), 1;
    const Many* many = way == AS_PANELS ? path->panels : way != AS_SPARSE ? nullptr : tiled ? path->tiled->sparse : path->sparse;
    const bool integers = path->integers && !many && int8;
    if (integers && int8 < count) return 0;  // they need the activations in different dtypes
    const Rounding rounding = integers ? rounding_for(x, type, rows, in) : ONCE;
    if (rounding == NEVER) return budwood_linear(matrices, count, x, type, rows, outputs, threads, AS_SPARSE);
    const bool twice = rounding == TWICE;
    const Input input = integers ? integers_for(rows, in, twice) : input_for(x, type, rows, in, bfloat16 || way == AS_PANELS, many != nullptr);
    const bool copy = input.data != x;
    char* table = many ? static_cast<char*>(scratch(5, many->bytes(matrices[0], input))) : nullptr;
    const int64_t parts = many ? many->parts(matrices[0], input) : 0;
    const int64_t at_once = path == &scalar ? rows : twice ? FEW / 2 : FEW, per = twice ? 2 : 1;
    const auto each_few = [&](auto use) {
        for (int64_t row = 0; row < rows; row += at_once) {
            use(row, some_of(input, per * row, per * (rows - row < at_once ? rows - row : at_once)));
        }
    };
    int64_t all_out = 0;
    for (int32_t i = 0; twice && i < count; ++i) all_out += matrices[i].out;
    // Of both parts of x; added and rounded at the end.
    float* parts_of_y = twice ? static_cast<float*>(scratch(5, size_t(2 * rows * all_out) * sizeof(float))) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const auto [me, all] = team();
        if (copy && many) {
            widen(x, type, in, input, share(rows, me, all), share(rows, me + 1, all));
        } else if (copy) {
            const auto bring_few = integers ? path->integers : interleave;
            const int64_t pieces = input.stride / (integers ? SEGMENT : LANE);
            each_few([&](int64_t row, const Input& some) {
                const char* from = static_cast<const char*>(x) + row * in * width(type);
                bring_few(from, type, in, some, share(pieces, me, all), share(pieces, me + 1, all));
            });
        }
        if (copy) {
#pragma omp barrier
        }
        if (many) {
            many->tabulate(input, table, share(parts, me, all), share(parts, me + 1, all));
#pragma omp barrier
        }
        float* both = parts_of_y;
        for (int32_t i = 0; i < count; both += twice ? 2 * rows * matrices[i].out : 0, ++i) {
            const Matrix& a = matrices[i];
            const auto border_of = tiled ? path->tiled->border : border;
            const int64_t first = border_of(a, me, all), last = border_of(a, me + 1, all);
            if (first >= last) continue;
            if (many) {
                many->multiply(a, input, table, outputs[i], first, last);
                continue;
            }
            // As much of the matrix at a time as stays in the L2 cache until it is multiplied with all rows of x.
            const int64_t chunk = rows <= at_once ? last - first : rows_near(a);
            for (int64_t begin = first; begin < last; begin += chunk) {
                const int64_t end = begin + chunk < last ? begin + chunk : last;
                each_few([&](int64_t row, const Input& some) {
                    Output out = outputs[i];
                    out.y = static_cast<char*>(out.y) + row * out.stride * width(out.type);
                    if (twice) out = {both + 2 * row * a.out, nullptr, a.out, FLOAT32};
                    path->few(a, some, out, begin, end);
                });
            }
            for (int64_t token = 0; twice && token < rows; ++token) {
                const float* whole = both + 2 * token * a.out;
                for (int64_t row = first; row < last; ++row) store(outputs[i], token, row, whole[row] + whole[a.out + row]);
            }
        }
    }
    return 1;
}

// Reads `bytes` and adds them up: the memory bandwidth, as a baseline.
EXPORT int64_t budwood_read(const void* data, int64_t bytes, int32_t threads) {
    const uint64_t* words = static_cast<const uint64_t*>(data);
    const int64_t count = bytes / 64 * 8;
    uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total) if (threads > 1)
    {
        const auto [me, all] = team();
        const int64_t first = share(count / 8, me, all) * 8, last = share(count / 8, me + 1, all) * 8;
        const int64_t half = (last - first) / 16 * 8;  // two streams, as the kernels read
        uint64_t sums[16] = {};
        for (int64_t i = 0; i < half; i += 8) {
            __builtin_prefetch(words + first + i + 256);
            __builtin_prefetch(words + first + half + i + 256);
            for (int k = 0; k < 8; ++k) sums[k] += words[first + i + k], sums[8 + k] += words[first + half + i + k];
        }
        for (int k = 0; k < 16; ++k) total += sums[k];
    }
    return int64_t(total);
}

// y = x W^T for a dense bfloat16 matrix [out, in] and at most FEW rows of bfloat16 x.
EXPORT int32_t budwood_dense(const uint16_t* weight, int64_t out, int64_t in, const void* x, int64_t rows, const Output* output,
                      int32_t threads) {
    if (!path->dense || rows > FEW) return 0;
    const Input input = input_for(x, BFLOAT16, rows, in, path->multiplies_bfloat16, false);
    if (input.data != x) interleave(x, BFLOAT16, in, input, 0, input.stride / LANE);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const auto [me, all] = team();
        const int64_t first = share(out, me, all), last = share(out, me + 1, all);
        if (first < last) path->dense(weight, in, input, *output, first, last);
    }
    return 1;
}

EXPORT int32_t budwood_has_norm() { return path->norm != nullptr; }

// On one thread, so for few rows.
EXPORT int32_t budwood_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t width, float epsilon, int32_t type,
                            int32_t form) {
    return path->norm && path->norm({x, weight, y, rows, width, epsilon, type, form});
}

EXPORT int32_t budwood_has_attention() { return path->attends != nullptr; }

EXPORT int32_t budwood_attend(const Attention* a, int32_t threads) {
    const int64_t pieces = path->attends ? path->attends->pieces(*a) : 0;
    if (!pieces) return 0;
    void* sums = scratch(5, size_t(path->attends->bytes(*a)));
    constexpr int64_t ENOUGH = 1 << 15;  // values: fewer are read in less time than another thread takes to begin
    const int64_t most = a->batch * a->shared * a->tokens * a->width / ENOUGH;
    if (threads > most) threads = most < 1 ? 1 : int32_t(most);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const auto [me, all] = team();
        path->attends->add(*a, sums, share(pieces, me, all), share(pieces, me + 1, all));
#pragma omp barrier
        const int64_t rows = a->batch * a->heads;
        path->attends->join(*a, sums, share(rows, me, all), share(rows, me + 1, all));
    }
    return 1;
}

}  // extern "C"
