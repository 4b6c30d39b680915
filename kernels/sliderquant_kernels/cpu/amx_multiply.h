/* Products by AMX: one instruction multiplies a tile of 16 tokens with one of 16 rows of the weight, over 64 inputs where
 * tokens are codes of 8 bits (tdpbsud), over 32 where they are bf16 (tdpbf16ps).
 *
 * Sums of codes are exact, and what becomes of them is computed as in vnni_multiply.h: both have the same bits. With
 * weights alone quantized (WIDE) tokens stay as they are here, and so do the integers q - z of the weight, which bf16
 * holds; the sum of a group of inputs is multiplied by its scale. Sums beyond 3e38 before that are infinite.
 */
#ifndef SLIDERQUANT_CPU_AMX_MULTIPLY_H
#define SLIDERQUANT_CPU_AMX_MULTIPLY_H

#include "job.h"

#define TILE_ROWS 16

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_BYTES 1024
/* Steps at a time, a multiple of those of a group: what is unpacked of the weight stays in the L1 cache while tokens pass;
 * and bytes of tokens at a time, which stay in the L2 cache while the weight passes. */
#define AMX_STEPS 8
#define AMX_L2_BYTES 786432
/* The compiler does not know that the instructions of tiles read memory: what they read has to be there. */
#define IN_MEMORY(PLACE) __asm__ volatile("" ::"r"(PLACE) : "memory")

/* The system saves a thread's tiles only for a process that has asked for it. */
static int has_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    static int asked = -1;
    if (asked < 0) asked = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return asked;
}

/* Groups of inputs that have a scale of their own in the weight. */
static int64_t groups_of(const Job *job) { return job->mode == PLAIN || !job->scale_stride ? 1 : job->groups; }

static int64_t row_bytes(const Job *job) { return job->mode == WIDE ? 2 * job->k : job->code_stride; }

/* Of a row of a left tile: the most that an instruction takes and that divide a group. */
static int64_t step_bytes(const Job *job) {
    const int64_t bytes = row_bytes(job) / groups_of(job), power = bytes & -bytes;
    return power < 64 ? power : 64;
}

/* Few inputs of a step would leave most of an instruction empty. */
static int takes_amx(const Job *job) {
    const int is_bf16 = job->mode != WIDE || job->x_type == BFLOAT16;
    return is_bf16 && job->amx_tokens && job->m >= job->amx_tokens && step_bytes(job) >= 32 && has_amx();
}

static int64_t tiles_bytes(const Job *job) {
    return (job->m + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * row_bytes(job);
}

/* Tokens at a time, a multiple of 32. */
static int64_t chunk_tokens(const Job *job) {
    const int64_t pairs = AMX_L2_BYTES / row_bytes(job) / (2 * TILE_ROWS), all = (job->m + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
    return 2 * TILE_ROWS * (pairs < 1 ? 1 : pairs < all ? pairs : all);
}

/* Of a thread: a panel of the weight, and the sums of a chunk of tokens with 32 rows. */
static int64_t panel_bytes(const Job *job) { return (2 * AMX_STEPS + chunk_tokens(job) / 8) * TILE_BYTES; }

/* The tokens as tiles [m / 16, steps, 16, step]: where rows lie a power of two apart, they fall into few sets of the
 * caches. */
static void tiles_part(const Job *job, int64_t part, int64_t parts) {
    const int64_t step = step_bytes(job), bytes = row_bytes(job), blocks = (job->m + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t stride = job->mode == WIDE ? 2 * job->x_stride : job->code_stride;
    const char *rows = job->mode == WIDE ? job->x : (const void *)job->codes;
    for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; block++) {
        const int64_t left = job->m - block * TILE_ROWS, tokens = left < TILE_ROWS ? left : TILE_ROWS;
        for (int64_t t = 0; t < tokens; t++) {
            const char *from = rows + (block * TILE_ROWS + t) * stride;
            char *to = job->tiles + block * TILE_ROWS * bytes + t * step;
            for (int64_t i = 0; i < bytes; i += step, to += TILE_ROWS * step) {
                if (step == 64)
                    _mm512_storeu_si512(to, _mm512_loadu_si512(from + i));
                else
                    _mm256_storeu_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)(from + i)));
            }
        }
    }
}

/* Tiles 0 to 3 are sums, 4 and 5 tokens, 6 and 7 the weight. */
static void configure_tiles(int64_t step, int64_t tokens) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = (uint16_t)(i == 4 || i == 5 ? step : 64);
        config.rows[i] = (uint8_t)(i < 6 ? tokens : step / 4);
    }
    IN_MEMORY(&config);
    _tile_loadconfig(&config);
}

/* Whether zero-points are subtracted from the codes as they are unpacked: an int8 holds the difference. Else they are
 * subtracted from sums. */
#define IS_SIGNED(MODE) ((MODE) == GROUPED && BITS < 8)

/* bf16 of -16 to 15, in this order. */
INLINE __m512i bf16_integers(void) {
    uint16_t table[32];
    for (int i = 0; i < 32; i++) {
        const float value = (float)(i - 16);
        uint32_t word;
        memcpy(&word, &value, 4);
        table[i] = (uint16_t)(word >> 16);
    }
    return _mm512_loadu_si512(table);
}

/* Four inputs of 16 rows, codes less `zero` -> two rows of a tile of bf16, of two inputs each. */
INLINE void store_bf16(uint8_t *tile, __m512i codes, __m512i zero, __m512i table) {
    if (BITS < 8) {
        const __m512i indices = _mm512_add_epi8(_mm512_sub_epi8(codes, zero), _mm512_set1_epi8(16));
        const __m512i low = _mm512_set4_epi32(0x800d800c, 0x80098008, 0x80058004, 0x80018000);
        const __m512i high = _mm512_set4_epi32(0x800f800e, 0x800b800a, 0x80078006, 0x80038002);
        _mm512_store_si512(tile, _mm512_permutexvar_epi16(_mm512_shuffle_epi8(indices, low), table));
        _mm512_store_si512(tile + 64, _mm512_permutexvar_epi16(_mm512_shuffle_epi8(indices, high), table));
        return;
    }
    __m512i words[4];
    for (int i = 0; i < 4; i++) {
        const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, (unsigned)(8 * i)), _mm512_set1_epi32(255));
        words[i] = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero)));
    }
    /* The lower halves of the fp32 are zero. */
    _mm512_store_si512(tile, _mm512_or_si512(_mm512_srli_epi32(words[0], 16), words[1]));
    _mm512_store_si512(tile + 64, _mm512_or_si512(_mm512_srli_epi32(words[2], 16), words[3]));
}

/* One or two blocks of 16 rows for the steps [begin, end) -> panel [steps, 2, TILE_BYTES]. */
INLINE void unpack_panel(const Job *job, int64_t block, int64_t blocks, int64_t begin, int64_t end, int64_t step,
                         uint8_t *panel, const int mode) {
    const __m512i code = _mm512_set1_epi8((char)((1 << BITS) - 1)), table = bf16_integers();
    const int64_t blocks_of_step = step / 4 / PLANES / (mode == WIDE ? 2 : 1);
    const int64_t steps_of_group = row_bytes(job) / step / groups_of(job);
    for (int64_t r = 0; r < blocks; r++) {
        const int64_t whole = job->first_block + block + r;
        const uint8_t *weight = job->weight + (whole * job->k_blocks + begin * blocks_of_step) * 64;
        uint8_t *tile = panel + r * TILE_BYTES;
        __m512i zero = _mm512_setzero_si512();
        for (int64_t i = begin; i < end; i++, tile += 2 * TILE_BYTES) {
            if ((IS_SIGNED(mode) || mode == WIDE) && (i == begin || i % steps_of_group == 0)) {
                zero = zero_of(job, i / steps_of_group * job->scale_stride + whole * LANES, mode);
                if (BITS < 8) zero = _mm512_mullo_epi32(zero, _mm512_set1_epi32(0x01010101));
            }
            uint8_t *row = tile;
            for (int64_t j = 0; j < blocks_of_step; j++, weight += 64) {
                const __m512i packed = _mm512_loadu_si512(weight);
                for (int plane = 0; plane < PLANES; plane++, row += mode == WIDE ? 128 : 64) {
                    __m512i w = plane ? _mm512_srli_epi16(packed, (unsigned)(plane * BITS)) : packed;
                    if (BITS < 8) w = _mm512_and_si512(w, code);
                    if (mode == WIDE)
                        store_bf16(row, w, zero, table);
                    else
                        _mm512_store_si512(row, IS_SIGNED(mode) ? _mm512_sub_epi8(w, zero) : w);
                }
            }
        }
    }
}

#define MULTIPLY(SUM, X, W)          \
    if (mode == WIDE)                \
        _tile_dpbf16ps(SUM, X, W);   \
    else if (IS_SIGNED(mode))        \
        _tile_dpbssd(SUM, X, W);     \
    else                             \
        _tile_dpbsud(SUM, X, W)

/* Sums of `steps` steps of 16 tokens or two times 16, with both blocks of a panel, on top of those that are there if they
 * `go_on` -> sums [2 (tokens), 2 (block), 16 (token), 16 (row)] in int32 or fp32. */
INLINE void multiply_steps(const char *first, const char *second, const uint8_t *panel, int64_t steps, int64_t step,
                           char *sums, int go_on, const int mode) {
    IN_MEMORY(panel);
    if (go_on) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE_BYTES, 64);
        _tile_loadd(2, sums + 2 * TILE_BYTES, 64);
        _tile_loadd(3, sums + 3 * TILE_BYTES, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < steps; i++) {
        _tile_loadd(4, first + i * TILE_ROWS * step, step);
        _tile_loadd(6, panel + 2 * i * TILE_BYTES, 64);
        _tile_loadd(7, panel + (2 * i + 1) * TILE_BYTES, 64);
        MULTIPLY(0, 4, 6);
        MULTIPLY(1, 4, 7);
        if (second) {
            _tile_loadd(5, second + i * TILE_ROWS * step, step);
            MULTIPLY(2, 5, 6);
            MULTIPLY(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE_BYTES, 64);
    if (second) {
        _tile_stored(2, sums + 2 * TILE_BYTES, 64);
        _tile_stored(3, sums + 3 * TILE_BYTES, 64);
    }
}

/* 16 outputs of `tokens` tokens: the sums of a group added to totals, and what becomes of them after the last. */
INLINE void add_tile(const Job *job, const char *sums, char *totals, int64_t token, int64_t tokens, int64_t group,
                     int64_t at, int64_t row, int finished, const int mode) {
    const int64_t column = group * job->scale_stride + at;
    const __m512i zero = mode == PLAIN ? _mm512_setzero_si512() : zero_of(job, column, mode);
    const __m512 scale = mode == PLAIN ? _mm512_setzero_ps() : scale_of(job, column, mode);
    for (int64_t t = 0; t < tokens; t++) {
        const __m512i sum = _mm512_load_si512(sums + 64 * t);
        __m512 total = group ? _mm512_load_ps((const float *)(totals + 64 * t)) : _mm512_setzero_ps();
        if (mode == WIDE)
            total = _mm512_fmadd_ps(_mm512_castsi512_ps(sum), scale, total);
        else if (mode == GROUPED)
            total = add_group(job, total, sum, sum, (token + t) * job->groups + group, zero, scale, !IS_SIGNED(mode), mode);
        if (finished)
            finish(job, total, sum, token + t, at, row, mode);
        else
            _mm512_store_ps((float *)(totals + 64 * t), total);
    }
}

INLINE void add_tiles(const Job *job, const char *sums, char *totals, int64_t block, int64_t blocks, int64_t token,
                      int64_t group, int finished, const int mode) {
    const int64_t left = job->m - token, at = (job->first_block + block) * LANES;
    for (int64_t from = 0; from < 2 * TILE_ROWS && from < left; from += TILE_ROWS) {
        const int64_t tokens = left - from < TILE_ROWS ? left - from : TILE_ROWS;
        for (int64_t r = 0; r < blocks; r++) {
            const int64_t place = (2 * (from / TILE_ROWS) + r) * TILE_BYTES;
            add_tile(job, sums + place, totals + place, token + from, tokens, group, at + r * LANES, (block + r) * LANES,
                     finished, mode);
        }
    }
}

/* Two blocks of 16 tokens (one, if it is the last) with the steps [begin, end). `totals` [2 (tokens), 2 (block), 16, 16]
 * are kept from one such range to the next: in fp32, or as they are where all inputs have one scale. */
INLINE void multiply_panel(const Job *job, int64_t block, int64_t blocks, int64_t token, int64_t begin, int64_t end,
                           int64_t step, const uint8_t *panel, char *totals, const int mode) {
    const int64_t groups = groups_of(job), bytes = row_bytes(job), all = bytes / step, size = TILE_ROWS * step;
    const char *first = job->tiles + token * bytes + begin * size;
    const char *second = job->m - token > TILE_ROWS ? first + TILE_ROWS * bytes : NULL;
    if (groups == 1) {
        multiply_steps(first, second, panel, end - begin, step, totals, begin > 0, mode);
        if (end == all) add_tiles(job, totals, totals, block, blocks, token, 0, 1, mode);
        return;
    }
    /* The sums of a group are added while the next one is multiplied. */
    char sums[8 * TILE_BYTES] __attribute__((aligned(64)));
    const int64_t steps = all / groups, before = begin / steps, count = (end - begin) / steps;
    for (int64_t i = 0; i < count; i++) {
        multiply_steps(first + i * steps * size, second ? second + i * steps * size : NULL,
                       panel + 2 * i * steps * TILE_BYTES, steps, step, sums + i % 2 * 4 * TILE_BYTES, 0, mode);
        if (i) add_tiles(job, sums + (i - 1) % 2 * 4 * TILE_BYTES, totals, block, blocks, token, before + i - 1, 0, mode);
    }
    add_tiles(job, sums + (count - 1) % 2 * 4 * TILE_BYTES, totals, block, blocks, token, before + count - 1, end == all,
              mode);
}

/* All tokens with the blocks [begin, end). `panel`: panel_bytes. */
INLINE void amx_multiply_blocks(const Job *job, int64_t begin, int64_t end, uint8_t *panel, const int mode) {
    const int64_t step = step_bytes(job), steps = row_bytes(job) / step, chunk = chunk_tokens(job);
    char *totals = (char *)panel + 2 * AMX_STEPS * TILE_BYTES;
    /* A last block alone is multiplied with what lies in the other one's place. */
    memset(panel, 0, 2 * AMX_STEPS * TILE_BYTES);
    configure_tiles(step, job->m < TILE_ROWS ? job->m : TILE_ROWS);
    for (int64_t start = 0; start < job->m; start += chunk) {
        const int64_t stop = job->m - start < chunk ? job->m : start + chunk;
        for (int64_t block = begin; block < end; block += 2) {
            const int64_t blocks = end - block < 2 ? 1 : 2;
            for (int64_t i = 0; i < steps; i += AMX_STEPS) {
                const int64_t next = steps - i < AMX_STEPS ? steps : i + AMX_STEPS;
                unpack_panel(job, block, blocks, i, next, step, panel, mode);
                for (int64_t token = start; token < stop; token += 2 * TILE_ROWS)
                    multiply_panel(job, block, blocks, token, i, next, step, panel,
                                   totals + (token - start) / 8 * TILE_BYTES, mode);
            }
        }
    }
    _tile_release();
}

#else

static int has_amx(void) { return 0; }

static int takes_amx(const Job *job) {
    (void)job;
    return 0;
}

static int64_t tiles_bytes(const Job *job) {
    (void)job;
    return 0;
}

static int64_t panel_bytes(const Job *job) {
    (void)job;
    return 0;
}

static void tiles_part(const Job *job, int64_t part, int64_t parts) { (void)job, (void)part, (void)parts; }

INLINE void amx_multiply_blocks(const Job *job, int64_t begin, int64_t end, uint8_t *panel, const int mode) {
    (void)job, (void)begin, (void)end, (void)panel, (void)mode;
}

#endif
#endif
