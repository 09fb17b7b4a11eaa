/* What stands for NVIDIA's driver: device memory is the host's, a stream does everything at once, events tell the time.
   Device memory begins as bytes that are NaN in any float. A graph is what the stand-in for TensorRT kept of its own
   while the stream was captured. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int R;
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
static int gone(void) { return getenv("STAND_IN_NO_GPU") ? 100 : 0; }

R cuInit(unsigned flags) { return gone(); }
R cuDeviceGet(int *device, int n) { *device = n; return 0; }
R cuDevicePrimaryCtxRetain(void **c, int device) { *c = (void *)1; return 0; }
R cuCtxSetCurrent(void *c) { return c == (void *)1 ? 0 : 201; }
R cuDeviceGetName(char *name, int size, int device) {
    const char *given = getenv("STAND_IN_GPU");
    strncpy(name, given ? given : "Stand-in GPU", size);
    return 0;
}
R cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 6 : -1;
    return 0;
}
R cuDriverGetVersion(int *version) { *version = 13020; return 0; }
R cuGetErrorName(int code, const char **name) {
    *name = code == 100 ? "CUDA_ERROR_NO_DEVICE" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
    return 0;
}
static size_t taken = 0;
R cuMemAlloc_v2(uint64_t *p, size_t size) {
    taken += size;
    void *made = aligned_alloc(512, (size + 511) / 512 * 512);
    if (!made) return 2;
    memset(made, 0xff, size);
    *p = (uint64_t)made;
    return 0;
}
R cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void *stream) {
    memset((void *)to, value, size);
    return stream == (void *)7 ? 0 : 400;
}
R cuMemGetInfo_v2(size_t *free_, size_t *total) { *total = 8000000000; *free_ = *total - taken; return 0; }
R cuMemHostAlloc(void **p, size_t size, unsigned flags) { *p = malloc(size); return *p ? 0 : 2; }
R cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
    memcpy((void *)to, from, size);
    return stream == (void *)7 ? 0 : 400;
}
R cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
    memcpy(to, (void *)from, size);
    return stream == (void *)7 ? 0 : 400;
}
typedef struct {
    size_t fromX, fromY;
    int fromType;
    const void *fromHost;
    uint64_t from;
    void *fromArray;
    size_t fromPitch, toX, toY;
    int toType;
    void *toHost;
    uint64_t to;
    void *toArray;
    size_t toPitch, width, height;
} Pieces; /* CUDA_MEMCPY2D */
R cuMemcpy2DAsync_v2(const Pieces *p, void *stream) {
    if (p->fromType != 2 || p->toType != 2 || p->fromPitch % 512 || p->toPitch % 512) return 1;
    if (p->fromX + p->width > p->fromPitch || p->toX + p->width > p->toPitch || p->fromY || p->toY) return 1;
    for (size_t i = 0; i < p->height; i++)
        memcpy((char *)p->to + i * p->toPitch + p->toX, (char *)p->from + i * p->fromPitch + p->fromX, p->width);
    return stream == (void *)7 ? 0 : 400;
}
R cuStreamCreate(void **s, unsigned flags) { *s = (void *)7; return 0; }
R cuStreamSynchronize(void *s) { return s == (void *)7 ? 0 : 400; }
R cuEventCreate(void **e, unsigned flags) { *e = calloc(1, sizeof(double)); return 0; }
R cuEventRecord(void *e, void *s) { *(double *)e = now(); return s == (void *)7 ? 0 : 400; }
R cuEventSynchronize(void *e) { return 0; }
R cuEventElapsedTime(float *ms, void *a, void *b) { *ms = (float)(*(double *)b - *(double *)a); return 0; }
static int capturing;
static void (*kept)(void);
int stand_in_capturing(void) { return capturing; }
void stand_in_keep(void (*work)(void)) { kept = work; }
R cuStreamBeginCapture_v2(void *s, int mode) {
    if (getenv("STAND_IN_NO_GRAPH")) return 900;
    capturing = 1;
    return s == (void *)7 ? 0 : 400;
}
R cuStreamEndCapture(void *s, void **g) {
    *g = (void *)kept;
    kept = NULL;
    capturing = 0;
    return *g ? 0 : 901;
}
R cuGraphInstantiateWithFlags(void **made, void *g, uint64_t flags) { *made = g; return 0; }
R cuGraphLaunch(void *made, void *s) {
    ((void (*)(void))made)();
    return s == (void *)7 ? 0 : 400;
}
