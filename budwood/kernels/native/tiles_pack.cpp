// Packs a matrix into tiles, and the exact inverse.
#include "tiles.h"

#include <cmath>
#include <numeric>
#include <vector>

namespace budwood::tiles {
namespace {

template <class Word>
INLINE Word word_at(const void* data, int64_t index) {
    Word word;
    std::memcpy(&word, at<Word>(data, index * int64_t(sizeof(Word))), sizeof(Word));
    return word;
}

INLINE uint32_t bits_at(const void* data, int64_t index, int32_t type) {
    switch (size_of(type)) {
        case 4: return word_at<uint32_t>(data, index);
        case 2: return word_at<uint16_t>(data, index);
        default: return word_at<uint8_t>(data, index);
    }
}

INLINE void set_bits(void* data, int64_t index, int32_t type, uint32_t bits) {
    switch (size_of(type)) {
        case 4: std::memcpy(at<uint32_t>(data, 4 * index), &bits, 4); break;
        case 2: std::memcpy(at<uint16_t>(data, 2 * index), &bits, 2); break;
        default: std::memcpy(at<uint8_t>(data, index), &bits, 1);
    }
}

float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Whether a lane can hold this weight. Zero says that a lane is empty.
INLINE bool fits(uint32_t bits, int32_t type) {
    const uint32_t exponent = bits >> (type == FLOAT32 ? 23 : 7) & 255;
    return size_of(type) == 1 || has_code_words(type) ? bits != 0 : exponent >> 6 == 1 && exponent & 63;
}

// Vector and lane of a slot of row i of a strip.
struct Place {
    int vector, lane;
    Place(int slot, int i) : vector(slot / 4 * 4 + i / 4 * 2 + slot % 2), lane(slot / 2 % 2 * 4 + i % 4) {}
    INLINE int64_t index(int32_t type) const {  // of the value in the tile
        switch (type) {
            case FLOAT32: return 8 * vector + lane;
            case BFLOAT16: return 16 * (vector / 2) + 2 * lane + vector % 2;
            case FLOAT16: return 16 + 8 * vector + lane;
            default: return 32 + 32 * (vector / 4) + 4 * lane + vector % 4;
        }
    }
};

// int4: weight and code are a field of 6 bits; of the sixteenth, two bits are at the top of each word of the lane.
INLINE void put_field(char* tile, Place place, uint32_t bits, uint32_t code) {
    uint32_t *word = at<uint32_t>(tile, 4 * place.lane), field = (bits & 15) << 2 | code;
    if (place.vector < 15) {
        word[8 * (place.vector / 5)] |= field << 6 * (place.vector % 5);
    } else {
        for (int i = 0; i < 3; ++i) word[8 * i] |= (field >> 2 * i & 3) << 30;
    }
}

// SHORTS: which word of 16 bits and byte of codes, and which of their four parts.
struct Short {
    int word, part;
    Short(int slot, int i) : word(slot / 8 * 16 + 2 * i + slot % 2), part(slot / 2 % 4) {}
};
constexpr int SHORT_CODES = 64;  // offset in a tile

INLINE void put_short(char* tile, Short place, uint32_t bits, uint32_t code) {
    at<uint16_t>(tile, 0)[place.word] |= uint16_t((bits & 15) << 4 * place.part);
    at<uint8_t>(tile, SHORT_CODES)[place.word] |= uint8_t(code << 2 * place.part);
}

// The byte that a nibble in two's complement is.
INLINE uint32_t widened(uint32_t nibble) { return uint8_t(int8_t((nibble ^ 8) - 8)); }

INLINE uint32_t get_field(const char* tile, Place place, uint32_t& code) {
    const uint32_t* word = at<const uint32_t>(tile, 4 * place.lane);
    const uint32_t field = place.vector < 15 ? word[8 * (place.vector / 5)] >> 6 * (place.vector % 5) & 63
                                             : word[0] >> 30 | word[8] >> 30 << 2 | word[16] >> 30 << 4;
    code = field & 3;
    return widened(field >> 2);
}

INLINE uint32_t get_short(const char* tile, Short place, uint32_t& code) {
    code = at<const uint8_t>(tile, SHORT_CODES)[place.word] >> 2 * place.part & 3;
    return widened(at<const uint16_t>(tile, 0)[place.word] >> 4 * place.part & 15);
}

// A slot of a late tile of row i.
struct Late {
    int half, byte;
    Late(int slot, int i) : half(slot / 4), byte(slot % 4 / 2 * 16 + 2 * i + slot % 2) {}
    INLINE uint8_t& weight(char* tile) const { return *at<uint8_t>(tile, byte); }
    INLINE uint8_t& column(char* tile) const { return *at<uint8_t>(tile, 32 + 32 * half + byte); }
};

INLINE void put(char* tile, int32_t type, Place place, uint32_t bits, uint32_t code) {
    if (type == INT4) return put_field(tile, place, bits, code);
    if (has_code_words(type)) {
        *at<uint32_t>(tile, 4 * place.lane) |= code << 2 * place.vector;
    } else {
        const int shift = type == BFLOAT16 ? CODE : WIDE_CODE;
        bits = (bits & ~(3u << shift)) | code << shift;
    }
    set_bits(tile, place.index(type), type, bits);
}

INLINE uint32_t get(const char* tile, int32_t type, Place place, uint32_t& code) {
    if (type == INT4) return get_field(tile, place, code);
    const uint32_t bits = bits_at(tile, place.index(type), type);
    if (has_code_words(type)) {
        code = *at<uint32_t>(tile, 4 * place.lane) >> 2 * place.vector & 3;
        return bits;
    }
    const int shift = type == BFLOAT16 ? CODE : WIDE_CODE;
    const uint32_t rest = bits & ~(3u << shift);
    code = bits >> shift & 3;
    return rest ? rest | 1u << shift : 0;
}

// The column of a slot, counted from the beginning of the row, with this code.
INLINE int64_t column_of(int32_t kind, int64_t tiles, int64_t ring, int64_t slot, int code) {
    const int64_t index = slot / 2 / ring;
    const int size = groups_in(tiles, ring, index), group = int(slot / 2 % ring);
    const int seen = slot % 2 ? group - AWAY[kind][code] : group;
    return (index * ring + (seen < 0 ? seen + size : seen)) * 4 + code;
}

// Columns with one scale; those that rotate together.
int64_t group_of(const Matrix& a) { return a.type == INT4 ? a.group : SEGMENT; }

// How a matrix is packed, and the same as one number.
struct Choice {
    int32_t kind, shorts, late;
    int32_t number() const { return kind | shorts << 1 | late << 2; }
    static Choice from(int32_t number) { return {number & 1, number >> 1 & 1, number >> 2}; }
};

// What a plan has found for each row of a matrix, for `pack`, which follows it: matching takes most of the time of either.
struct Found {
    const void* values = nullptr;  // of the matrix
    int32_t choice = 0;
    std::vector<std::vector<int8_t>> codes;  // by row: as in Row
    std::vector<std::vector<int32_t>> late;
};

thread_local Found last_plan;

// A row by its slots and extras.
struct Row {
    std::vector<uint32_t> bits;     // of the values, by column
    std::vector<uint32_t> extras;   // columns
    std::vector<uint32_t> more;     // bits of recovered weights, which have no entry in `bits`
    std::vector<uint64_t> placed;   // columns that want a slot, one bit each
    std::vector<uint64_t> outside;  // columns without one
    std::vector<int8_t> codes;      // by slot; -1: empty
    std::vector<int32_t> late;      // columns by slot of late tiles; -1: empty

    int32_t entries() const {
        int64_t count = 0;
        uint32_t last = 0;
        for (const uint32_t column : extras) count += 1 + (column - last) / SKIP, last = column;
        return int32_t(count);
    }

    // known: of a plan of the same choice, or null.
    template <int TYPE>
    void read(const Matrix& a, int64_t row, const Choice& choice, const Found* known = nullptr) {
        const int64_t tiles = round_up(a.in, TILE) / TILE, segments = segments_of(a);
        bits.resize(size_t(tiles * TILE));  // read only where a weight is
        placed.assign(size_t(4 * segments), 0);
        outside.assign(size_t(4 * segments), 0);
        codes.assign(size_t(SLOTS * tiles), -1);
        extras.clear();
        more.clear();
        int64_t next = a.starts[row];
        for (int64_t word = 0; word < tiles; ++word) {
            if (a.coding == NIBBLES) {
                for (int slot = 0; slot < SLOTS && 32 * word + slot / 2 * 4 < a.in; ++slot) {
                    codes[SLOTS * word + slot] = int8_t(a.places[row * a.stride + 4 * word + slot / 4] >> 2 * (slot % 4) & 3);
                }
            }
            for (uint32_t mask = mask_word(a, row, word); mask; mask &= mask - 1, ++next) {
                const int64_t column = 32 * word + __builtin_ctz(mask);
                bits[column] = bits_at(a.values, next, TYPE);
                if (fits(bits[column], TYPE)) {
                    placed[column / 64] |= 1ull << column % 64;
                } else if (a.coding == BITMASK || bits[column]) {  // a zero of a 2:4 matrix keeps its slot
                    outside[column / 64] |= 1ull << column % 64;
                }
            }
        }
        const int64_t ring = group_of(a) / 4;
        if (known) {
            place_known(tiles, ring, choice.kind, known->codes[row], known->late[row]);
        } else {
            find_places(a, tiles, ring, choice);
        }
        for (size_t word = 0; word < outside.size(); ++word) {
            for (uint64_t rest = outside[word]; rest; rest &= rest - 1) {
                extras.push_back(uint32_t(64 * word + __builtin_ctzll(rest)));
            }
        }
        if (!a.more_starts) return;
        int64_t k = a.more_starts[row];
        for (int64_t segment = 0; segment < segments; ++segment) {
            for (int n = a.more_counts[row * segments + segment]; n; --n, ++k) {
                extras.push_back(uint32_t(segment * SEGMENT + a.more_columns[k]));
                more.push_back(bits_at(a.more_values, k, a.more_type));
            }
        }
    }

    // Slots for the weights of a BITMASK row: those of tiles first, then late ones.
    void find_places(const Matrix& a, int64_t tiles, int64_t ring, const Choice& choice) {
        for (int64_t i = 0; a.coding == BITMASK && i * ring < 8 * tiles; ++i) {
            assign(i, ring, groups_in(tiles, ring, i), choice.kind);
        }
        late.assign(size_t(choice.late * LATE * (round_up(tiles, ring / 8) / (ring / 8))), -1);
        for (int64_t i = 0; choice.late && i * ring < 8 * tiles; ++i) move_to_late(i, ring, choice.late * LATE);
    }

    void place_known(int64_t tiles, int64_t ring, int32_t kind, const std::vector<int8_t>& slots,
                     const std::vector<int32_t>& columns) {
        codes = slots, late = columns;
        const auto placed_now = [&](int64_t column) { placed[column / 64] &= ~(1ull << column % 64); };
        for (size_t slot = 0; slot < codes.size(); ++slot) {
            if (codes[slot] >= 0) placed_now(column_of(kind, tiles, ring, int64_t(slot), codes[slot]));
        }
        for (const int32_t column : late) {
            if (column >= 0) placed_now(column);
        }
        for (size_t word = 0; word < outside.size(); ++word) outside[word] |= placed[word];
    }

    // Moves as many weights without a slot as there are late slots for a ring of groups of four.
    void move_to_late(int64_t index, int64_t ring, int slots) {
        int64_t next = index * slots;
        for (int64_t word = index * ring / 16; word < (index + 1) * ring / 16 && word < int64_t(outside.size()); ++word) {
            for (uint64_t rest = outside[word]; rest && next < (index + 1) * slots; rest &= rest - 1) {
                const int64_t column = 64 * word + __builtin_ctzll(rest);
                if (!fits(bits[column], INT4)) continue;
                late[next++] = int32_t(column);
                outside[word] &= ~(1ull << column % 64);
            }
        }
    }

    // Assigns as many weights of a ring of groups (64 at most, whose first `size` there are) as possible to slots: a matching in
    // which every group has one slot of either view and a weight fits the two that see it. A slot that sees only one weight takes
    // it, repeatedly; where no slot is like that, any choice is as good as another. One bit for each group, all groups at once.
    void assign(int64_t index, int64_t ring, int size, int32_t kind) {
        const int64_t first = index * ring / 16;  // word of columns
        const int words = int(ring / 4);
        constexpr uint64_t FIRST = 0x1111111111111111ull;  // column 0 of each group
        const uint64_t all = ~0ull >> (64 - size);
        uint64_t open[4] = {}, free[2] = {all, all}, taken[2][4] = {};  // weights and slots without one another; pairs
        const auto rotate = [&](uint64_t groups, int by) {
            by %= size;
            return by ? (groups << by | groups >> (size - by)) & all : groups;
        };
        const auto step = [&](int view, bool any) {
            uint64_t seen[4], one = 0, several = 0;
            for (int i = 0; i < 4; ++i) {
                seen[i] = rotate(open[i], view * AWAY[kind][i]);
                several |= one & seen[i];
                one |= seen[i];
            }
            uint64_t chosen = free[view] & one & (any ? one : ~several);
            if (any && kind == ROTATED) chosen &= -chosen;  // a single slot; groups that see only their own are independent
            free[view] &= ~chosen;
            const bool found = chosen != 0;
            for (int i = 0; i < 4 && chosen; ++i) {
                const uint64_t takes = seen[i] & chosen;
                chosen &= ~takes;
                taken[view][i] |= takes;
                open[i] &= ~rotate(takes, (size - view * AWAY[kind][i] % size) % size);
            }
            return found;
        };
        for (int i = 0; i < words; ++i) open[i % 4] |= _pext_u64(placed[first + i / 4], FIRST << i % 4) << i / 4 * 16;
        while (step(0, false) | step(1, false) || step(0, true) || step(1, true)) {
        }
        for (int i = 0; i < words; ++i) outside[first + i / 4] |= _pdep_u64(open[i % 4] >> i / 4 * 16, FIRST << i % 4);
        for (int i = 0; i < 8; ++i) {
            for (uint64_t rest = taken[i / 4][i % 4]; rest; rest &= rest - 1) {
                codes[2 * (index * ring + __builtin_ctzll(rest)) + i / 4] = int8_t(i % 4);
            }
        }
    }
};

int32_t extra_type(const Matrix& a) {
    if (a.more_starts) return a.more_type;
    return a.type == INT8 ? int32_t(FLOAT32) : a.type == INT4 ? int32_t(BFLOAT16) : a.type;  // int4 * scale has 8 bits
}

// Where everything is: rows in the order of their entries, and the offsets of the strips.
struct Plan {
    Head head = {};
    std::vector<int32_t> rows;
    std::vector<int64_t> begins;
    Plan(const Matrix& a, const Choice& choice, const int32_t* entries) {
        Head& h = head;
        h.kind = choice.kind, h.shorts = choice.shorts, h.late = choice.late;
        const int64_t row_bytes = round_up(4 * (a.out + 1), LINE);
        h.out = a.out, h.in = a.in, h.count = a.count, h.more_count = a.more_starts ? a.more_starts[a.out] : -1;
        h.type = a.type, h.coding = a.coding, h.extra_type = extra_type(a), h.group = group_of(a);
        h.tiles = round_up(a.in, TILE) / TILE, h.strips = round_up(a.out, STRIP) / STRIP;
        h.rows = round_up(sizeof(Head), LINE);
        h.entries = h.rows + round_up(4 * STRIP * h.strips, LINE);
        h.starts = h.entries + round_up(4 * STRIP * h.strips, LINE);
        h.more_starts = h.starts + row_bytes;
        h.begins = h.more_starts + (a.more_starts ? row_bytes : 0);
        h.data = h.begins + round_up(8 * (h.strips + 1), LINE);
        rows.assign(size_t(STRIP * h.strips), -1);
        std::iota(rows.begin(), rows.begin() + a.out, 0);
        for (int64_t row = 0; row < a.out; row += SORTED) {
            std::stable_sort(rows.begin() + row, rows.begin() + std::min<int64_t>(row + SORTED, a.out),
                             [&](int32_t one, int32_t other) { return entries[one] > entries[other]; });
        }
        begins.push_back(h.data);
        for (int64_t strip = 0; strip < h.strips; ++strip) {
            const int64_t longest = entries[rows[STRIP * strip]] * entry_bytes(h.extra_type);
            begins.push_back(begins.back() + round_up(extras_offset(h, type_of(h)) + longest, LINE));
        }
        h.bytes = begins.back();
    }
};

// The weights of row i, in the order of the strips, to their lanes.
template <int TYPE>
void pack_slots(const Row& row, const Head& h, int64_t i) {
    for (int64_t t = 0; t < h.tiles; ++t) {
        char* tile = strip_of(h, i / STRIP) + tile_offset(h, TYPE, t);
        for (int slot = 0; slot < SLOTS; ++slot) {
            const int code = row.codes[SLOTS * t + slot];
            if (code < 0) continue;
            const uint32_t bits = row.bits[column_of(h.kind, h.tiles, h.group / 4, SLOTS * t + slot, code)];
            const uint32_t value = fits(bits, TYPE) ? bits : 0;
            if (h.shorts) put_short(tile, Short(slot, int(i % STRIP)), value, uint32_t(code));
            else put(tile, TYPE, Place(slot, int(i % STRIP)), value, uint32_t(code));
        }
    }
    for (size_t slot = 0; slot < row.late.size(); ++slot) {
        if (row.late[slot] < 0) continue;
        const Late place(int(slot % LATE), int(i % STRIP));
        char* tile = late_of(h, i / STRIP, row.late[slot] / h.group) + int64_t(slot / LATE) % h.late * LATE_BYTES;
        place.weight(tile) |= uint8_t((row.bits[row.late[slot]] & 15) << 4 * place.half);
        place.column(tile) = uint8_t(row.late[slot] % h.group);
    }
}

// Row i of a DENSE matrix, in the order of the strips.
void pack_whole(const Matrix& a, const Head& h, int64_t i) {
    const int8_t* values = static_cast<const int8_t*>(a.values) + int64_t(rows_of(h, i / STRIP)[i % STRIP]) * a.in;
    for (int64_t column = 0; column < a.in; ++column) {
        char* tile = strip_of(h, i / STRIP) + tile_offset(h, WHOLE, column / TILE);
        at<uint32_t>(tile, 32 * (column % TILE / 8))[i % STRIP] |= (uint32_t(values[column]) & 15) << 4 * (column % 8);
    }
}

void unpack_whole(const Head& h, int64_t i, int8_t* values) {
    for (int64_t column = 0; column < h.in; ++column) {
        const char* tile = strip_of(h, i / STRIP) + tile_offset(h, WHOLE, column / TILE);
        values[column] = int8_t(widened(at<uint32_t>(tile, 32 * (column % TILE / 8))[i % STRIP] >> 4 * (column % 8) & 15));
    }
}

// The scales of a row of a matrix with integer values, [ceil(in / group)].
void pack_scales(const float* scales, const Head& h, int64_t i) {
    for (int64_t column = 0; column < h.in; column += h.group) {
        char* to = strip_of(h, i / STRIP) + scales_offset(h, type_of(h), column);
        const float scale = scales[column / h.group];
        h.type == INT8 ? void(at<float>(to, 0)[i % STRIP] = scale) : void(at<uint16_t>(to, 0)[i % STRIP] = to_bfloat16(scale));
    }
}

void unpack_scales(const Head& h, int64_t i, float* scales) {
    for (int64_t column = 0; column < h.in; column += h.group) {
        const char* from = strip_of(h, i / STRIP) + scales_offset(h, type_of(h), column);
        scales[column / h.group] = h.type == INT8 ? at<float>(from, 0)[i % STRIP] : from_bfloat16(at<uint16_t>(from, 0)[i % STRIP]);
    }
}

// Extras of row i, in the order of the strips. False where a value would be lost.
template <int TYPE>
bool pack_extras(const Row& row, const Matrix& a, const Head& h, int64_t i) {
    const int64_t r = rows_of(h, i / STRIP)[i % STRIP];
    const float* scales = has_scales(TYPE) ? a.scales + r * (round_up(a.in, h.group) / h.group) : nullptr;
    bool exact = true;
    at<int32_t>(&h, h.entries)[i] = row.entries();
    int64_t next = 0;
    uint32_t last = 0;
    for (size_t j = 0; j < row.extras.size(); ++j) {
        const uint32_t column = row.extras[j];
        for (; column - last >= SKIP; last += SKIP) entry_of(h, i / STRIP, next++)[i % STRIP] = SKIP;
        uint32_t bits = a.more_starts ? row.more[j] : row.bits[column];
        if (has_scales(TYPE) && !a.more_starts) {  // as a float; the integer must follow from it
            const float scale = scales[column / h.group], value = float(int8_t(bits));
            exact = exact && (value == 0 || std::nearbyint(value * scale / scale) == value);
            bits = as_bits(value * scale) >> (TYPE == INT4 ? 16 : 0);
        }
        uint8_t* entry = entry_of(h, i / STRIP, next++);
        entry[i % STRIP] = uint8_t(column - last);
        set_bits(entry + STRIP, i % STRIP, h.extra_type, bits);
        last = column;
    }
    return exact;
}

// Calls use(type, known to the compiler).
template <class Use>
void with_type(int32_t type, Use use) {
    switch (type) {
        case FLOAT32: return use(std::integral_constant<int, FLOAT32>());
        case BFLOAT16: return use(std::integral_constant<int, BFLOAT16>());
        case FLOAT16: return use(std::integral_constant<int, FLOAT16>());
        case INT4: return use(std::integral_constant<int, INT4>());
        default: return use(std::integral_constant<int, INT8>());
    }
}

// Counts the entries of every row that `step` divides; their sum. keep: where slots are kept, if not null.
int64_t count_entries(const Matrix& a, const Choice& choice, int64_t step, int32_t* entries, Found* keep = nullptr) {
    int64_t total = 0;
    with_type(a.type, [&](auto type) {
#pragma omp parallel reduction(+ : total)
        {
            Row row;
#pragma omp for schedule(static)
            for (int64_t r = 0; r < a.out; r += step) {
                row.read<type()>(a, r, choice);
                entries[r] = row.entries();
                total += entries[r];
                if (keep) keep->codes[r] = row.codes, keep->late[r] = row.late;
            }
        }
    });
    return total;
}

}  // namespace

// Counts the entries of every row, [out], for the choice that has fewer bytes in a sample of rows. Returns the bytes of the
// packed matrix; 0 where the layout cannot hold it. shorts: whether INT4 values shall be SHORTS.
int64_t plan(const Matrix& a, bool shorts, int32_t& kind, int32_t* entries) {
    constexpr int64_t NEGLIGIBLE = 40;  // one entry in this many weights: another kind would gain little
    constexpr int64_t SAMPLE = 64;      // rows that decide, from all over the matrix
    if (a.in > 65536 || a.out < 1 || a.in < 1 || (a.coding == NIBBLES && a.in % 4)) return 0;
    Choice choice = {GROUPS, shorts && a.type == INT4 && a.coding != DENSE, 0};
    if (a.coding == BITMASK) {
        const int64_t step = std::max<int64_t>(a.out / SAMPLE, 1), sampled = (a.out + step - 1) / step;
        int64_t found = count_entries(a, choice, step, entries);
        if (found * NEGLIGIBLE >= sampled * a.in) {
            const Choice rotated = {ROTATED, choice.shorts, 0};
            if (const int64_t others = count_entries(a, rotated, step, entries); others < found) choice = rotated, found = others;
        }
        // One late tile more for eight rows of each group, as long as it saves more than it takes.
        const int64_t tile = sampled * (round_up(a.in, group_of(a)) / group_of(a)) * LATE_BYTES / STRIP;
        while (choice.shorts) {
            const Choice more = {choice.kind, choice.shorts, choice.late + 1};
            const int64_t others = count_entries(a, more, step, entries);
            if ((found - others) * entry_bytes(extra_type(a)) / STRIP <= tile) break;
            choice = more, found = others;
        }
    }
    kind = choice.number();
    last_plan = {};
    if (a.coding == BITMASK) {
        last_plan.values = a.values, last_plan.choice = kind;
        last_plan.codes.resize(size_t(a.out)), last_plan.late.resize(size_t(a.out));
    }
    if (a.coding == DENSE) std::fill(entries, entries + a.out, 0);
    else count_entries(a, choice, 1, entries, a.coding == BITMASK ? &last_plan : nullptr);
    return Plan(a, choice, entries).head.bytes;
}

void forget() { last_plan = {}; }

// Fills `to`, which is zero and aligned to a line, with as many bytes as `plan` returned. False where a value would be lost.
bool pack(const Matrix& a, int32_t kind, const int32_t* entries, void* to) {
    const Choice choice = Choice::from(kind);
    const Plan plan(a, choice, entries);
    Head& h = *static_cast<Head*>(to);
    h = plan.head;
    std::copy(plan.rows.begin(), plan.rows.end(), at<int32_t>(to, h.rows));
    std::copy(plan.begins.begin(), plan.begins.end(), at<int64_t>(to, h.begins));
    std::copy(a.starts, a.starts + a.out + 1, at<int32_t>(to, h.starts));
    if (a.more_starts) std::copy(a.more_starts, a.more_starts + a.out + 1, at<int32_t>(to, h.more_starts));
    bool exact = true;
    const Found& known = last_plan;  // of this thread, for all of them
    const bool planned = known.values == a.values && known.choice == kind && int64_t(known.codes.size()) == a.out;
    with_type(a.type, [&](auto type) {
        constexpr int TYPE = type();
#pragma omp parallel reduction(&& : exact)
        {
            Row row;
#pragma omp for schedule(static, STRIP)  // the rows of a strip share words of codes, so one thread packs them
            for (int64_t i = 0; i < STRIP * h.strips; ++i) {
                if (plan.rows[i] < 0) continue;
                if (has_scales(TYPE)) pack_scales(a.scales + plan.rows[i] * (round_up(a.in, h.group) / h.group), h, i);
                if (h.coding == DENSE) {
                    pack_whole(a, h, i);
                    continue;
                }
                row.read<TYPE>(a, plan.rows[i], choice, planned ? &known : nullptr);
                pack_slots<TYPE>(row, h, i);
                exact = pack_extras<TYPE>(row, a, h, i) && exact;
            }
        }
    });
    last_plan = {};
    return exact;
}

// The file's tensors. Those that the format does not have are null.
void unpack(const void* from, void* values, uint8_t* places, float* scales, uint8_t* more_counts, uint8_t* more_columns,
            void* more_values) {
    const Head& h = *static_cast<const Head*>(from);
    const int64_t segments = round_up(h.in, SEGMENT) / SEGMENT, stride = round_up(h.in, 8) / 8;
    const int32_t *starts = at<int32_t>(from, h.starts), *more_starts = at<int32_t>(from, h.more_starts);
    with_type(h.type, [&](auto type) {
        constexpr int TYPE = type();
#pragma omp parallel
        {
            std::vector<uint32_t> bits(size_t(h.tiles * TILE));
            std::vector<uint8_t> kept(size_t(h.tiles * TILE));
#pragma omp for schedule(static, STRIP)
            for (int64_t i = 0; i < STRIP * h.strips; ++i) {
                const int64_t row = at<int32_t>(from, h.rows)[i];
                if (row < 0) continue;
                const char* strip = strip_of(h, i / STRIP);
                float* own_scales = scales ? scales + row * (round_up(h.in, h.group) / h.group) : nullptr;
                if (scales) unpack_scales(h, i, own_scales);
                if (h.coding == DENSE) {
                    unpack_whole(h, i, static_cast<int8_t*>(values) + row * h.in);
                    continue;
                }
                uint8_t* mask = places + row * stride;
                std::memset(mask, 0, size_t(stride));
                std::fill(kept.begin(), kept.end(), 0);
                for (int64_t slot = 0; slot < SLOTS * h.tiles; ++slot) {
                    uint32_t code;
                    const int inside = int(slot % SLOTS), r = int(i % STRIP);
                    const char* tile = strip + tile_offset(h, TYPE, slot / SLOTS);
                    const uint32_t value = h.shorts ? get_short(tile, Short(inside, r), code) : get(tile, TYPE, Place(inside, r), code);
                    const int64_t column = column_of(h.kind, h.tiles, h.group / 4, slot, int(code));
                    if (h.coding == NIBBLES ? column >= h.in : !value) continue;
                    kept[column] = 1, bits[column] = value;
                    if (h.coding == NIBBLES) mask[slot / 4] |= uint8_t(code << 2 * (slot % 4));
                }
                const int64_t late_slots = h.late * LATE;
                for (int64_t slot = 0; slot < round_up(h.in, h.group) / h.group * late_slots; ++slot) {
                    const Late place(int(slot % LATE), int(i % STRIP));
                    char* tile = late_of(h, i / STRIP, slot / late_slots) + slot % late_slots / LATE * LATE_BYTES;
                    const uint32_t value = place.weight(tile) >> 4 * place.half & 15;
                    if (!value) continue;
                    const int64_t column = slot / late_slots * h.group + place.column(tile);
                    kept[column] = 1, bits[column] = widened(value);
                }
                if (more_counts) std::memset(more_counts + row * segments, 0, size_t(segments));
                int64_t column = 0, more = more_counts ? more_starts[row] : 0;
                for (int64_t j = 0; j < at<int32_t>(from, h.entries)[i]; ++j) {
                    const uint8_t* entry = entry_of(h, i / STRIP, j);
                    column += entry[i % STRIP];
                    if (entry[i % STRIP] == SKIP) continue;
                    uint32_t value = bits_at(entry + STRIP, i % STRIP, h.extra_type);
                    if (more_counts) {
                        ++more_counts[row * segments + column / SEGMENT];
                        more_columns[more] = uint8_t(column % SEGMENT);
                        set_bits(more_values, more++, h.extra_type, value);
                        continue;
                    }
                    if (has_scales(TYPE)) {
                        if (TYPE == INT4) value <<= 16;
                        value = value << 1 ? uint32_t(int(std::nearbyint(as_float(value) / own_scales[column / h.group]))) : 0;
                    }
                    kept[column] = 1, bits[column] = value;
                }
                int64_t next = starts[row];
                for (int64_t column = 0; column < h.in; ++column) {
                    if (!kept[column]) continue;
                    if (h.coding == BITMASK) mask[column / 8] |= uint8_t(1 << column % 8);
                    set_bits(values, next++, TYPE, bits[column]);
                }
            }
        }
    });
}

}  // namespace budwood::tiles
