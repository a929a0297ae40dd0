/* One kernel, in PTX, which any driver compiles for the GPU that there is. */
#ifndef MESH_COPY_ROWS_H
#define MESH_COPY_ROWS_H

#include <stdint.h>

enum { UNIT_BYTES = 16, MAX_COPIES = 32 };

typedef struct {
    uint64_t to, from, units; /* of UNIT_BYTES */
    uint64_t permit, wanted;  /* none where `permit` is not NULL and the 64 bits there are not `wanted` */
} row_copy;

/* copy_rows(copies): one of MAX_COPIES for each row of blocks, a thread for each unit. A launch takes the
 * host longer than their list takes to be copied with it. */
static const char COPY_ROWS[] =
    ".version 7.0\n"
    ".target sm_70\n"
    ".address_size 64\n"
    ".visible .entry copy_rows(.param .align 8 .b8 copies[1280])\n"
    "{\n"
    "  .reg .pred %none, %other, %past;\n"
    "  .reg .b32 %part, %block, %threads, %thread, %blocks, %a, %b, %c, %d;\n"
    "  .reg .b64 %copy, %permit, %said, %wanted, %unit, %step, %units, %to, %from, %at, %source, %target;\n"
    "  mov.u32 %part, %ctaid.y;\n"
    "  mul.wide.u32 %at, %part, 40;\n"
    "  mov.u64 %copy, copies;\n"
    "  add.u64 %copy, %copy, %at;\n"
    "  ld.param.u64 %to, [%copy];\n"
    "  ld.param.u64 %from, [%copy+8];\n"
    "  ld.param.u64 %units, [%copy+16];\n"
    "  ld.param.u64 %permit, [%copy+24];\n"
    "  ld.param.u64 %wanted, [%copy+32];\n"
    "  mov.u32 %block, %ctaid.x;\n"
    "  mov.u32 %threads, %ntid.x;\n"
    "  mov.u32 %thread, %tid.x;\n"
    "  mov.u32 %blocks, %nctaid.x;\n"
    "  mul.wide.u32 %unit, %block, %threads;\n"
    "  cvt.u64.u32 %at, %thread;\n"
    "  add.u64 %unit, %unit, %at;\n"
    "  mul.wide.u32 %step, %blocks, %threads;\n"
    "  setp.eq.u64 %none, %permit, 0;\n"
    "  @%none bra UNIT;\n"
    "  ld.volatile.global.u64 %said, [%permit];\n"
    "  setp.ne.u64 %other, %said, %wanted;\n"
    "  @%other bra END;\n"
    "UNIT:\n"
    "  setp.ge.u64 %past, %unit, %units;\n"
    "  @%past bra END;\n"
    "  shl.b64 %at, %unit, 4;\n"
    "  add.u64 %source, %from, %at;\n"
    "  add.u64 %target, %to, %at;\n"
    "  ld.global.v4.u32 {%a, %b, %c, %d}, [%source];\n"
    "  st.global.v4.u32 [%target], {%a, %b, %c, %d};\n"
    "  add.u64 %unit, %unit, %step;\n"
    "  bra UNIT;\n"
    "END:\n"
    "  ret;\n"
    "}\n";

#endif
