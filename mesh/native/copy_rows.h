/* One kernel, in PTX, which any driver compiles for the GPU that there is. */
#ifndef MESH_COPY_ROWS_H
#define MESH_COPY_ROWS_H

#include <stdint.h>

enum { UNIT_BYTES = 16, MAX_COPIES = 32 };

/* Where a kernel puts the outputs of rows, and how many it may: see mesh/gpu_kernels.py's grouped_out. */
typedef struct {
    uint64_t to, rows;
    uint64_t permit, wanted; /* none where `permit` is not NULL and the 64 bits there are not `wanted` */
} delivery;

typedef struct {
    uint64_t to, from, units; /* of UNIT_BYTES */
    uint64_t note;            /* where to leave the delivery for kernels behind; NULL: it is of this copy */
    delivery out;             /* of a copy its permit alone */
} row_copy;

/* copy_rows(copies): one of MAX_COPIES for each row of blocks, a thread for each unit. A launch takes the
 * host longer than their list takes to be copied with it. */
#define COPY_ROWS_FOR(target, first) \
    target \
    ".address_size 64\n" \
    ".visible .entry copy_rows(.param .align 8 .b8 copies[2048])\n" \
    "{\n" \
    "  .reg .pred %none, %other, %past;\n" \
    "  .reg .b64 %note, %out, %rows;\n" \
    "  .reg .b32 %part, %block, %threads, %thread, %blocks, %a, %b, %c, %d;\n" \
    "  .reg .b64 %copy, %permit, %said, %wanted, %unit, %step, %units, %to, %from, %at, %source, %target;\n" \
    first \
    "  mov.u32 %part, %ctaid.y;\n" \
    "  mul.wide.u32 %at, %part, 64;\n" \
    "  mov.u64 %copy, copies;\n" \
    "  add.u64 %copy, %copy, %at;\n" \
    "  ld.param.u64 %to, [%copy];\n" \
    "  ld.param.u64 %from, [%copy+8];\n" \
    "  ld.param.u64 %units, [%copy+16];\n" \
    "  ld.param.u64 %note, [%copy+24];\n" \
    "  ld.param.u64 %out, [%copy+32];\n" \
    "  ld.param.u64 %rows, [%copy+40];\n" \
    "  ld.param.u64 %permit, [%copy+48];\n" \
    "  ld.param.u64 %wanted, [%copy+56];\n" \
    "  mov.u32 %block, %ctaid.x;\n" \
    "  mov.u32 %threads, %ntid.x;\n" \
    "  mov.u32 %thread, %tid.x;\n" \
    "  mov.u32 %blocks, %nctaid.x;\n" \
    "  mul.wide.u32 %unit, %block, %threads;\n" \
    "  cvt.u64.u32 %at, %thread;\n" \
    "  add.u64 %unit, %unit, %at;\n" \
    "  mul.wide.u32 %step, %blocks, %threads;\n" \
    "  setp.eq.u64 %none, %note, 0;\n" \
    "  @%none bra ASK;\n" \
    "  setp.ne.u64 %other, %unit, 0;\n" \
    "  @%other bra UNIT;\n" \
    "  st.global.u64 [%note], %out;\n" \
    "  st.global.u64 [%note+8], %rows;\n" \
    "  st.global.u64 [%note+16], %permit;\n" \
    "  st.global.u64 [%note+24], %wanted;\n" \
    "  bra UNIT;\n" \
    "ASK:\n" \
    "  setp.eq.u64 %none, %permit, 0;\n" \
    "  @%none bra UNIT;\n" \
    "  ld.volatile.global.u64 %said, [%permit];\n" \
    "  setp.ne.u64 %other, %said, %wanted;\n" \
    "  @%other bra END;\n" \
    "UNIT:\n" \
    "  setp.ge.u64 %past, %unit, %units;\n" \
    "  @%past bra END;\n" \
    "  shl.b64 %at, %unit, 4;\n" \
    "  add.u64 %source, %from, %at;\n" \
    "  add.u64 %target, %to, %at;\n" \
    "  ld.global.v4.u32 {%a, %b, %c, %d}, [%source];\n" \
    "  st.global.v4.u32 [%target], {%a, %b, %c, %d};\n" \
    "  add.u64 %unit, %unit, %step;\n" \
    "  bra UNIT;\n" \
    "END:\n" \
    "  ret;\n" \
    "}\n"

static const char COPY_ROWS[] = COPY_ROWS_FOR(".version 7.0\n.target sm_70\n", "");
/* What depends on it may come to where it waits for it. */
static const char COPY_ROWS_ON_HOPPER[] =
    COPY_ROWS_FOR(".version 7.8\n.target sm_90\n", "  griddepcontrol.launch_dependents;\n");

#endif
