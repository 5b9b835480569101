// Puts rows of weights into panels (`linear.h`), on several threads: a model's load waits for it.
#include <algorithm>
#include <thread>
#include <vector>

#include "linear.h"

namespace mmaas {

// Rows [first, first + 32) of `outputs`, each `lanes` numbers of 32 bits; rows that aren't there are zero.
static void pack_panel(const uint32_t* rows, int64_t first, int64_t outputs, int64_t lanes, uint32_t* panel) {
    const int64_t count = std::min<int64_t>(PANEL, outputs - first);
    for (int64_t from = 0; from < lanes; from += LANES) {  // a cache line of each row
        const int64_t width = std::min<int64_t>(LANES, lanes - from);
        uint32_t turned[LANES][PANEL] = {};
        for (int64_t row = 0; row < count; ++row)
            for (int64_t lane = 0; lane < width; ++lane) turned[lane][row] = rows[(first + row) * lanes + from + lane];
        std::copy_n(turned[0], width * PANEL, panel + from * PANEL);
    }
}

}  // namespace mmaas

extern "C" void mmaas_pack(const uint32_t* rows, int64_t outputs, int64_t lanes, uint32_t* panels, int32_t threads) {
    using namespace mmaas;
    const int64_t count = (outputs + PANEL - 1) / PANEL;
    auto work = [=](int rank) {
        const Range part = Range::part(count, rank, threads);
        for (int64_t panel = part.first; panel < part.last; ++panel)
            pack_panel(rows, panel * PANEL, outputs, lanes, panels + panel * lanes * PANEL);
    };
    std::vector<std::thread> others;
    for (int rank = 1; rank < threads; ++rank) others.emplace_back(work, rank);
    work(0);
    for (auto& thread : others) thread.join();
}
