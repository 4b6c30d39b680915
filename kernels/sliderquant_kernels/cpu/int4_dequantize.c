/* Dequantize rows of torch's int4 container, see int4.py: one pass over the packed bytes, vectorised by the compiler.
 *
 * w[k, row] = (c - 8 + steps) * scale, with steps = round(zero / scale), or 0 where the weight is symmetric. The integer
 * is exact in fp32, and its product with a bf16 scale has at most 13 significant bits: the result is rounded once.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64 /* rows that are stored together, at the most */
#define TILE 16  /* blocks that are written side by side */

typedef struct {
    const uint8_t *packed;  /* [blocks, k, block / 2] */
    const uint16_t *fused;  /* scale and zero of each row, bf16 [groups, ., 2], of the first row */
    void *out;              /* [k, .] bf16 or fp32, at the first row */
    int64_t k, groups, block, blocks, fused_stride, out_stride;
    int32_t halves, symmetric, as_float, threads;
} Job;

typedef struct {
    const Job *job;
    int (*number)(void), (*count)(void);
} Shared;

static inline float from_bf16(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

/* One row k of a block, its outputs in their natural order: low nibbles are the first half of them, or every second. */
static inline void dequantize_row(const Job *job, const uint8_t *packed, const float *scale, const float *offset,
                                  float *value) {
    const int64_t size = job->block, half = size / 2;
    if (job->halves && size == BLOCK) {
        for (int row = 0; row < BLOCK / 2; row++) {
            value[row] = ((float)(packed[row] & 15) - offset[row]) * scale[row];
            value[row + BLOCK / 2] = ((float)(packed[row] >> 4) - offset[row + BLOCK / 2]) * scale[row + BLOCK / 2];
        }
        return;
    }
    for (int64_t pair = 0; pair < half; pair++) {
        const int64_t low = job->halves ? pair : 2 * pair, high = job->halves ? pair + half : 2 * pair + 1;
        value[low] = ((float)(packed[pair] & 15) - offset[low]) * scale[low];
        value[high] = ((float)(packed[pair] >> 4) - offset[high]) * scale[high];
    }
}

/* A group of some neighbouring blocks, k by k: what is written lies together. Block by block, it would lie so far apart
 * that it falls into few sets of the caches. */
static void dequantize_tile(const Job *job, int64_t first, int64_t blocks, int64_t group) {
    const int64_t size = job->block, per_group = job->k / job->groups;
    float scale[TILE * BLOCK], offset[TILE * BLOCK], value[BLOCK];
    const uint16_t *fused = job->fused + 2 * (group * job->fused_stride + first * size);
    for (int64_t row = 0; row < blocks * size; row++) {
        scale[row] = from_bf16(fused[2 * row]);
        offset[row] = 8.0f - (job->symmetric ? 0.0f : rintf(from_bf16(fused[2 * row + 1]) / scale[row]));
    }
    for (int64_t k = group * per_group; k < (group + 1) * per_group; k++) {
        for (int64_t block = 0; block < blocks; block++) {
            const uint8_t *packed = job->packed + ((first + block) * job->k + k) * (size / 2);
            dequantize_row(job, packed, scale + block * size, offset + block * size, value);
            const int64_t place = k * job->out_stride + (first + block) * size;
            if (job->as_float) {
                memcpy((float *)job->out + place, value, (size_t)size * sizeof(float));
            } else {
                uint16_t *out = (uint16_t *)job->out + place;
                if (size == BLOCK)
                    for (int row = 0; row < BLOCK; row++) out[row] = to_bf16(value[row]);
                else
                    for (int64_t row = 0; row < size; row++) out[row] = to_bf16(value[row]);
            }
        }
    }
}

static void dequantize_part(const Job *job, int64_t part, int64_t parts) {
    const int64_t tiles = (job->blocks + TILE - 1) / TILE, units = tiles * job->groups;
    for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; unit++) {
        const int64_t first = unit % tiles * TILE;
        const int64_t blocks = job->blocks - first < TILE ? job->blocks - first : TILE;
        dequantize_tile(job, first, blocks, unit / tiles);
    }
}

static void dequantize_thread(void *argument) {
    const Shared *shared = argument;
    dequantize_part(shared->job, shared->number(), shared->count());
}

/* The functions are GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP runtime that torch has
 * loaded: one of our own would compete with it for the cores. NULL: one thread. */
int sliderquant_dequantize_int4(const Job *job, void (*parallel)(void (*)(void *), void *, unsigned, unsigned),
                                int (*number)(void), int (*count)(void)) {
    if (job->block > BLOCK || job->block % 2 || job->k % job->groups) return 1;
    if (job->threads > 1 && parallel && number && count) {
        Shared shared = {job, number, count};
        parallel(dequantize_thread, &shared, (unsigned)job->threads, 0);
    } else {
        dequantize_part(job, 0, 1);
    }
    return 0;
}
