/* What stands for NVIDIA's driver: device memory is the host's, a stream does everything at once, events tell the time.
   Launched graphs do nothing: what would be in them is TensorRT's own. */
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
R cuMemAlloc_v2(uint64_t *p, size_t size) { *p = (uint64_t)malloc(size); return *p ? 0 : 2; }
R cuMemHostAlloc(void **p, size_t size, unsigned flags) { *p = malloc(size); return *p ? 0 : 2; }
R cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
    memcpy((void *)to, from, size);
    return stream == (void *)7 ? 0 : 400;
}
R cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
    memcpy(to, (void *)from, size);
    return stream == (void *)7 ? 0 : 400;
}
R cuStreamCreate(void **s, unsigned flags) { *s = (void *)7; return 0; }
R cuStreamSynchronize(void *s) { return s == (void *)7 ? 0 : 400; }
R cuEventCreate(void **e, unsigned flags) { *e = calloc(1, sizeof(double)); return 0; }
R cuEventRecord(void *e, void *s) { *(double *)e = now(); return s == (void *)7 ? 0 : 400; }
R cuEventSynchronize(void *e) { return 0; }
R cuEventElapsedTime(float *ms, void *a, void *b) { *ms = (float)(*(double *)b - *(double *)a); return 0; }
R cuStreamBeginCapture_v2(void *s, int mode) { return getenv("STAND_IN_NO_GRAPH") ? 900 : s == (void *)7 ? 0 : 400; }
R cuStreamEndCapture(void *s, void **g) { *g = (void *)9; return 0; }
R cuGraphInstantiateWithFlags(void **made, void *g, uint64_t flags) { *made = (void *)11; return g == (void *)9 ? 0 : 1; }
R cuGraphLaunch(void *made, void *s) { return made == (void *)11 && s == (void *)7 ? 0 : 400; }
